"""Check a dataset before a training, or write traces from it.

`python -m segrl.prepare check data=NAME` tells whether a download is complete.
`python -m segrl.prepare traces data.root=FOLDER out=FILE.jsonl` writes chat traces from images and masks.
Both read datasets as downloaded, and move, rename or delete none of their files.
"""

from __future__ import annotations

import sys

from segrl.runs.command import enter
from segrl.runs.dataset_check import check
from segrl.runs.traces import traces


def main() -> None:
    """Run the command line."""
    jobs = {"traces": traces, "check": check}
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
        return
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        print(
            f"segrl: prepare: must be followed by one of {', '.join(jobs)}: "
            "python -m segrl.prepare check --help",
            file=sys.stderr,
        )
        sys.exit(2)
    job = sys.argv.pop(1)
    keys = [argument.lstrip("+").split("=")[0] for argument in sys.argv[1:]]
    if job == "check" and "data" not in keys and any(key.startswith("data.") for key in keys):
        print(
            "segrl: data: must be given together with data.*: data=NAME, "
            "or data=image_mask for folders of your own",
            file=sys.stderr,
        )
        sys.exit(2)
    enter(f"prepare_{job}", jobs[job])


if __name__ == "__main__":
    main()
