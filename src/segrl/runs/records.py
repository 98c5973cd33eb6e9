"""Lines of JSON, one per evaluated sample: the record format of trainings and evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from segrl.host.files import write_whole
from segrl.metrics.functional.bootstrap import numbered
from segrl.metrics.parts import Parts, ScoreFamily
from segrl.tracking.run_folder import RunFolder
from segrl.types import Answer, Sample

_NEEDED = {"dataset", "id", "fault", "scores", "parts"}


def row(
    dataset: str, sample: Sample, answer: Answer, parts: Parts, family: ScoreFamily, seconds: float | None
) -> dict[str, Any]:
    """Return the line of one sample: query, answer, areas in pixels, own scores, and parts.

    Trainings and evaluations write the same lines.

    Args:
        dataset: name of the test set.
        sample: evaluated sample.
        answer: its answer.
        parts: `family.parts` of it, from which the scores of the set are computed.
        family: way of scoring.
        seconds: time that it took; None leaves it out, so that lines of equal runs are equal.
    """
    fault, prompt = answer.parsed.fault, answer.parsed.prompt
    said = {} if prompt is None else {
        "boxes": prompt.boxes.tolist(), "points": prompt.points.tolist(), "labels": prompt.labels.tolist()
    }  # fmt: skip
    mask, truth = sample.counted(answer.mask), sample.counted(sample.mask)
    return {
        "dataset": dataset, "id": sample.id, **clustered(sample), "query": sample.query, "text": answer.text,
        "fault": None if fault is None else fault.name, **said,
        "intersection": int(np.count_nonzero(mask & truth)), "union": int(np.count_nonzero(mask | truth)),
        "mask_area": int(np.count_nonzero(answer.mask)), "truth_area": int(np.count_nonzero(sample.mask)),
        "scores": {
            name: None if np.isnan(value) else float(value) for name, value in family.summary(parts).items()
        },
        "parts": {name: _packed(value) for name, value in parts.items()},
        **({} if seconds is None else {"seconds": round(seconds, 4)}),
    }  # fmt: skip


def clustered(sample: Sample) -> dict[str, str]:
    """Return `{"cluster": name}` if the sample shares its image with others, else {}."""
    return {} if sample.cluster is None else {"cluster": sample.cluster}


def clusters(lines: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Return the number of each line's cluster, int64 `[lines]`; intervals resample clusters."""
    return numbered([
        ("image", line["cluster"]) if "cluster" in line else (line["dataset"], line["id"]) for line in lines
    ])  # fmt: skip


def _packed(value: np.ndarray) -> float | list[float]:
    """Return a part as JSON: a scalar as a number, a curve as a list.

    The curve of a binary mask is constant but for its last value: only its first and last value are kept.
    """
    if len(value) == 1:
        return float(value[0])
    flat = bool((value[:-1] == value[0]).all())
    return [float(value[0]), float(value[-1])] if flat else [float(v) for v in value]


def parts_of(line: dict[str, Any]) -> Parts:
    """Return the parts in a line, as `ScoreFamily.parts` computed them."""
    parts = {}
    for name, value in line["parts"].items():
        listed = value if isinstance(value, list) else [value]
        parts[name] = np.array(listed if len(listed) != 2 else listed[:1] * 255 + listed[1:], np.float64)
    return parts


def scores_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return a line's scores by name, NaN for null, and its `fault_rate`: 1 for a fault, else 0.

    Trainings of segrl 0.1 wrote the scores beside the other keys of a line, `fault_rate` among them.
    """
    if "scores" not in line:
        return {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
    own = {name: np.nan if value is None else float(value) for name, value in line["scores"].items()}
    return own | {"fault_rate": float(line["fault"] is not None)}


def lines(folder: Path, dataset: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a dataset from all files of an evaluation.

    Damaged lines, such as one that a kill has cut off, are skipped, so their samples are scored again.
    """
    for path in (
        RunFolder(folder).per_sample,
        *sorted(RunFolder(folder).parts.glob(f"*.{escape(dataset)}.jsonl")),
    ):
        if not path.is_file():
            continue
        for text in path.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):
                with suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and set(line) >= _NEEDED and line["dataset"] == dataset:
                        yield line


def new_part(folder: Path, dataset: str, rank: int) -> TextIO:
    """Create and open a file for the lines of one rank and dataset; each start or resume makes a new one."""
    home = RunFolder(folder).parts
    home.mkdir(parents=True, exist_ok=True)
    attempt = len(list(home.glob(f"*-{rank}.{escape(dataset)}.jsonl")))
    return (home / f"{attempt:03}-{rank}.{dataset}.jsonl").open("x")


def join(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write all lines to one file in the order of `rows`, and delete the files of the ranks."""
    lines = (json.dumps(line, allow_nan=False) + "\n" for found in rows.values() for line in found)
    write_whole(RunFolder(folder).per_sample, "".join(lines))
    parts = RunFolder(folder).parts
    for path in parts.glob("*"):
        path.unlink()
    if parts.is_dir():
        parts.rmdir()
