"""Scores of 1024x1024 maps, beside pysodmetrics 1.6.2: CPU seconds per image, one thread.

`python benchmarks/metrics.py` prints one JSON line per claim: medians over maps and repeats, the two sides
measured in turn. It exits with 1 where a bar is missed or where the two sides' scores differ. segrl runs in
this environment. pysodmetrics runs in one of its own, which uv makes, because the bounds of the two exclude
each other. Of its two F-measures the faster one runs.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIDE, MAPS, REPEATS, ROUNDS, SEED = 1024, 4, 3, 3, 0
PEER = (
    "pysodmetrics==1.6.2",
    "numpy==2.3.4",
    "scipy==1.17.1",
    "scikit-image==0.25.2",
    "opencv-python-headless==4.14.0.94",
)
# how many times our CPU time theirs has to be
BARS = {"mae structure enhanced f": 10.0, "mae structure enhanced f weighted_f": 3.0}
FOUR, FIVE = BARS


def pairs(binary: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return maps and truths: one to five soft discs, noise everywhere, and sometimes a false object."""
    rng, (y, x) = np.random.default_rng(SEED), np.mgrid[:SIDE, :SIDE]
    made = []
    for _ in range(MAPS):
        truth, found = np.zeros((2, SIDE, SIDE))
        for _ in range(int(rng.integers(1, 6))):
            (cy, cx), radius = rng.integers(100, SIDE - 100, 2), int(rng.integers(40, 260))
            distance = np.sqrt((y - cy) ** 2 + (x - cx) ** 2)
            truth = np.maximum(truth, distance < radius)
            found = np.maximum(
                found, np.clip((radius + int(rng.integers(-20, 20)) - distance) / 30 + 0.5, 0, 1)
            )
        grey = np.clip(20 + 200 * found + rng.integers(-30, 31, (SIDE, SIDE)), 0, 255).astype(np.uint8)
        made.append(((grey >= 128).astype(np.uint8) * np.uint8(255) if binary else grey, truth > 0))
    return made


def ours() -> dict[str, Callable[[np.ndarray, np.ndarray], list[float]]]:
    """Return segrl's side of each claim, by name."""
    from segrl.metrics.functional.tally import e_measure, f_measure, mean_absolute_error, structure, tally
    from segrl.metrics.functional.weighted import weighted_f

    def four(saliency: np.ndarray, truth: np.ndarray) -> list[float]:
        t = tally(saliency, truth)
        (adaptive_e, e), (adaptive_f, f) = e_measure(t), f_measure(t)
        scores = [
            mean_absolute_error(t),
            structure(t),
            adaptive_e,
            e.mean(),
            e.max(),
            adaptive_f,
            f.mean(),
            f.max(),
        ]
        return [float(score) for score in scores]

    return {FOUR: four, FIVE: lambda saliency, truth: [*four(saliency, truth), weighted_f(saliency, truth)]}


def theirs() -> dict[str, Callable[[np.ndarray, np.ndarray], list[float]]]:
    """Return pysodmetrics' side of each claim, by name."""
    import warnings

    import py_sod_metrics as peer

    warnings.simplefilter("ignore")

    def scored(saliency: np.ndarray, truth: np.ndarray, weighted: bool) -> list[float]:
        metrics = [
            peer.MAE(),
            peer.Smeasure(),
            peer.Emeasure(),
            peer.Fmeasure(),
            *[peer.WeightedFmeasure()] * weighted,
        ]
        found: list[float] = []
        for metric in metrics:
            metric.step(saliency, truth)
            for value in metric.get_results().values():
                if not isinstance(value, dict):
                    found.append(float(value))
                elif "curve" in value:
                    found += [float(value["adp"]), float(value["curve"].mean()), float(value["curve"].max())]
        return found

    return {FOUR: lambda s, t: scored(s, t, False), FIVE: lambda s, t: scored(s, t, True)}


def measure(side: str) -> None:
    """Print the CPU seconds and the scores of one side, by kind of map and claim."""
    import cv2

    cv2.setNumThreads(1)
    found: dict[str, dict[str, dict[str, list]]] = {}
    for kind in ("grey", "binary"):
        inputs = [(s, t if side == "ours" else t.astype(np.uint8) * 255) for s, t in pairs(kind == "binary")]
        for claim, score in (ours() if side == "ours" else theirs()).items():
            score(*inputs[0])
            seconds, scores = [], []
            for _ in range(REPEATS):
                for saliency, truth in inputs:
                    began = time.process_time()
                    scores.append(score(saliency, truth))
                    seconds.append(time.process_time() - began)
            found.setdefault(kind, {})[claim] = {"seconds": seconds, "scores": scores[:MAPS]}
    print(json.dumps(found))


def run(side: str) -> dict:
    """Run `measure` in a process of its own."""
    command = [sys.executable]
    if side == "theirs":
        uv = shutil.which("uv") or str(Path(__file__).resolve().parents[1] / ".uv" / "bin" / "uv")
        wanted = [word for package in PEER for word in ("--with", package)]
        command = [uv, "run", "--quiet", "--isolated", "--no-project", "--python", "3.11", *wanted, "python"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [*command, __file__, side],
        env={**os.environ, **threads},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> int:
    """Measure both sides in turn, print, and say whether every bar is passed."""
    rounds = [{side: run(side) for side in ("ours", "theirs")} for _ in range(ROUNDS)]
    passed = True
    for kind in ("grey", "binary"):
        for claim, bar in BARS.items():
            medians = {
                side: statistics.median(s for r in rounds for s in r[side][kind][claim]["seconds"])
                for side in ("ours", "theirs")
            }
            scores = [np.array(rounds[0][side][kind][claim]["scores"]) for side in ("ours", "theirs")]
            difference, ratio = (
                float(np.abs(scores[0] - scores[1]).max()),
                medians["theirs"] / medians["ours"],
            )
            good = ratio >= bar and difference <= 1e-9
            passed = passed and good
            print(json.dumps({
                "maps": f"{kind} {SIDE}x{SIDE}", "scores": claim, "peer": PEER[0],
                "cpu_ms": {side: round(1000 * value, 2) for side, value in medians.items()},
                "ratio": round(ratio, 1), "bar": bar, "largest_difference": difference, "passed": good,
            }))  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        sys.exit(main())
