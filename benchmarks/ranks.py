"""One process beside two, on a CPU: wall seconds of an update of the demo, one thread per process.

An update has 16 prompts x 8 completions in all. `python benchmarks/ranks.py` prints one JSON line. The time
of a short run is subtracted from that of a longer one, so that starting up does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHORT, LONG = 5, 45


def wall(ranks: int, updates: int, folder: Path) -> float:
    """Return the wall seconds of a whole run."""
    command = [
        sys.executable, "-m", "segrl.train", "+experiment=demo", "logger=csv", "test_before=false",
        "data.test_length=2", "stage.schedule=null", f"trainer.max_steps={updates}",
        f"data.batch_size={16 // ranks}", f"trainer.devices={ranks}", "trainer.accelerator=cpu",
        f"paths.run={folder}/{ranks}-{updates}", *(["trainer=ddp"] if ranks > 1 else []),
    ]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.monotonic() - began


def main() -> None:
    """Measure one process and two, in turn."""
    folder = Path(tempfile.mkdtemp())
    seconds = {
        ranks: round((wall(ranks, LONG, folder) - wall(ranks, SHORT, folder)) / (LONG - SHORT), 3)
        for ranks in (1, 2)
    }
    print(json.dumps({
        "case": "ranks", "wall_seconds_an_update": seconds, "speedup": round(seconds[1] / seconds[2], 2),
        "updates": LONG - SHORT,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
