"""How a GRPO step grows with the group, the prompts, the completions and the image.

`python benchmarks/scaling.py [--plot FILE.png]` measures CPU seconds of the tiny VLM of `tiny_vlm.py`, one
thread. It prints one JSON line per point (median of the steps), then the fit of the seconds against P + G*T
tokens per prompt, which is what a step reads, and against G*(P + T), which is what it would read with one row
per completion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import noise
import numpy as np
import tiny_vlm

AXES = {
    "group": [(1, g, 64, 392) for g in (2, 4, 8, 16, 32)],
    "prompts": [(b, 8, 64, 392) for b in (1, 2, 4)],
    "completion": [(1, 8, t, 392) for t in (16, 32, 64, 128)],
    "image side": [(1, 8, 64, s) for s in (196, 280, 392, 560)],
}
STEP = (
    "import sys, json; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1); "
    "from pathlib import Path; import grpo_step, noise; b, g, t, s = map(int, sys.argv[3:7]); "
    "work = noise.Work(prompts=b, group=g, tokens=t, side=s); "
    "print(json.dumps(grpo_step.ours(Path(sys.argv[2]), work)))"
)


def seconds(folder: Path, point: tuple[int, int, int, int]) -> float:
    """Return the CPU seconds of one step, in a process of its own."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", STEP, here, str(folder), *map(str, point)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def tokens(point: tuple[int, int, int, int]) -> tuple[int, int]:
    """Return the tokens that a step reads: with prefixes read once, and with one row per completion."""
    prompts, group, length, side = point
    prefix = noise.Work(prompts=prompts, side=side).prefix
    return prompts * (prefix + group * length), prompts * group * (prefix + length)


def main() -> None:
    """Measure, fit, and plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plot", type=Path)
    plot = parser.parse_args().plot
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "tiny")
    found: dict[tuple[int, int, int, int], float] = {}
    for axis, points in AXES.items():
        for point in points:
            found[point] = found.get(point) or seconds(folder, point)
            prompts, group, length, side = point
            print(json.dumps({
                "axis": axis, "prompts": prompts, "group": group, "completion": length, "side": side,
                "tokens": tokens(point)[0], "tokens_by_row": tokens(point)[1],
                "cpu_seconds": round(found[point], 3),
            }), flush=True)  # fmt: skip
    measured = np.array(list(found.values()))
    fits = {}
    for name, which in (("P + G*T", 0), ("G*(P + T)", 1)):
        read = np.array([tokens(point)[which] for point in found], float)
        slope, offset = np.polyfit(read, measured, 1)
        left = measured - (slope * read + offset)
        fits[name] = {
            "seconds_per_1000_tokens": round(1000 * slope, 3), "offset": round(offset, 3),
            "r2": round(1 - (left**2).sum() / ((measured - measured.mean()) ** 2).sum(), 4),
        }  # fmt: skip
    print(json.dumps({"case": "scaling", "fits": fits}))
    if plot is not None:
        draw(found, fits["P + G*T"], plot)


def draw(found: dict[tuple[int, int, int, int], float], fit: dict[str, float], plot: Path) -> None:
    """Draw one panel per axis, and one against the tokens that are read.

    The dotted line has every row reading all of its own tokens at the same speed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 5, figsize=(15, 3), layout="constrained")
    for panel, (axis, points), place in zip(panels, AXES.items(), (1, 0, 2, 3), strict=False):
        values = [point[place] for point in points]
        panel.plot(values, [found[p] for p in points], "o-", color="tab:blue", label="measured")
        rows = [fit["offset"] + fit["seconds_per_1000_tokens"] * tokens(p)[1] / 1000 for p in points]
        panel.plot(values, rows, ":", color="tab:gray", label="if G(P + T) were read")
        panel.set(xlabel=axis, ylim=(0, None))
    panels[0].set_ylabel("CPU seconds a step")
    panels[0].legend(frameon=False)
    panels[4].plot([tokens(p)[0] for p in found], list(found.values()), "o", color="tab:blue")
    panels[4].set(xlabel="tokens read, B(P + G T)", ylim=(0, None), xlim=(0, None))
    figure.savefig(plot, dpi=110)


if __name__ == "__main__":
    main()
