"""Small evaluations, and readers of what they wrote, for the tests of evaluations."""

from __future__ import annotations

import json
from pathlib import Path

from segrl.data.synthetic import SyntheticScenes

NANO = ("logger=csv", "trainer=cpu", "data.workers=0", "suite.draws=40")
EVAL = ("+suite=synthetic", "testsets.synthetic.samples.length=6", "testsets.synthetic.published=6", *NANO)


def rows(folder: Path, timed: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "per_sample.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timed or k != "seconds"} for line in lines]


def datasets(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["datasets"]


def values(folder: Path, name: str = "synthetic") -> dict[str, float]:
    return {key: score["value"] for key, score in datasets(folder)[name]["scores"].items()}


def scenes(count: int = 6) -> SyntheticScenes:
    return SyntheticScenes("test", count, 0, 128, (0.1, 0.5), (1, 1))
