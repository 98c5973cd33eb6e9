"""`python -m segrl.chain FILE --runs FOLDER [key=value ...]`: run a chain of trainings.

FILE lists runs that start from each other's checkpoints, such as chains/seg_r1_nano.yaml. A table of all
runs is printed and written to table.md in FOLDER. The command can be repeated: finished runs are skipped, and
stopped runs are resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from segrl.host import signals
from segrl.runs.chain import read, rows, run_all, table, with_overrides


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chain", type=Path, help="YAML of the runs")
    parser.add_argument("--runs", type=Path, required=True, help="folder of their run folders")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="number of runs at the same time; a run that starts from another waits for it",
    )
    parser.add_argument(
        "overrides", nargs="*", help="key=value or group=option, for every run that has not begun"
    )
    arguments = parser.parse_intermixed_args()
    with signals.watched():
        try:
            chain = with_overrides(read(arguments.chain), arguments.overrides)
            run_all(chain, arguments.runs, arguments.at_once)
            found = rows(chain, arguments.runs)
        except ValueError as error:
            print(f"segrl: {error}", file=sys.stderr)
            sys.exit(2)
        except signals.Stopped as stop:
            print(
                f"stopped by {stop.name}: the same command continues each run from its checkpoint", flush=True
            )
            signals.leave(stop)
    text = f"{chain.title}; {chain.metric} on held-out samples\n\n{table(chain, found)}\n"
    (arguments.runs / "table.md").write_text(text)
    print(f"\n{text}\ntable in {arguments.runs / 'table.md'}")


if __name__ == "__main__":
    main()
