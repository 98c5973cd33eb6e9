"""Lines of JSON, one per evaluated sample, and the table of scores that is made from them."""

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
from segrl.metrics.parts import Family, Parts, Score
from segrl.types import Answer, Sample

_PARTS = "per_sample.parts"  # one file per rank, attempt and dataset; joined once all samples are scored
WHOLE = "per_sample.jsonl"
_NEEDED = {"dataset", "id", "fault", "scores", "parts"}


def row(
    dataset: str, sample: Sample, answer: Answer, parts: Parts, family: Family, seconds: float
) -> dict[str, Any]:
    """Return the line of one sample: query, answer, areas in pixels, own scores, and parts.

    Args:
        dataset: name of the test set.
        sample: evaluated sample.
        answer: its answer.
        parts: `family.parts` of it, from which the scores of the set are computed.
        family: way of scoring.
        seconds: time that it took.
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
        "parts": {name: _packed(value) for name, value in parts.items()}, "seconds": round(seconds, 4),
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
    """Return the parts in a line, as `Family.parts` computed them."""
    parts = {}
    for name, value in line["parts"].items():
        listed = value if isinstance(value, list) else [value]
        parts[name] = np.array(listed if len(listed) != 2 else listed[:1] * 255 + listed[1:], np.float64)
    return parts


def lines(folder: Path, dataset: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a dataset from all files of an evaluation.

    Damaged lines, such as one that a kill has cut off, are skipped, so their samples are scored again.
    """
    for path in (folder / WHOLE, *sorted((folder / _PARTS).glob(f"*.{escape(dataset)}.jsonl"))):
        if not path.is_file():
            continue
        for text in path.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):
                with suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict) and set(line) >= _NEEDED and line["dataset"] == dataset:
                        yield line


def new_part(folder: Path, dataset: str, rank: int) -> TextIO:
    """Create and open a file for the lines that this rank writes."""
    home = folder / _PARTS
    home.mkdir(parents=True, exist_ok=True)
    attempt = len(list(home.glob(f"*-{rank}.{escape(dataset)}.jsonl")))
    return (home / f"{attempt:03}-{rank}.{dataset}.jsonl").open("x")


def join(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write all lines to one file in the order of `rows`, and delete the files of the ranks."""
    lines = (json.dumps(line, allow_nan=False) + "\n" for found in rows.values() for line in found)
    write_whole(folder / WHOLE, "".join(lines))
    for path in (folder / _PARTS).glob("*"):
        path.unlink()
    if (folder / _PARTS).is_dir():
        (folder / _PARTS).rmdir()


def tables_text(
    tables: dict[str, dict[str, Score]],
    counts: dict[str, int],
    faults: dict[str, float] | None = None,
    images: Mapping[str, int] | None = None,
) -> str:
    """Return a table of plain text: datasets in rows, scores with 95 % intervals in columns, in blocks.

    Args:
        tables: scores of each dataset.
        counts: number of samples of each dataset.
        faults: share of each dataset's completions that could not be parsed; if None, it is not shown.
        images: number of clusters of each dataset, which its intervals resample. Where it is not the number
            of samples, a line says so.
    """
    told, names = list[str](), list(next(iter(tables.values())))
    wide = 11 if all(table[name].interval is None for table in tables.values() for name in names) else 28
    for start in range(0, len(names), 112 // wide):
        shown = names[start : start + 112 // wide]
        told.append(f"\n  {'':<16}{'n':>7}" + "".join(f"{name:>{wide}}" for name in shown))
        for dataset, table in tables.items():
            cells = "".join(f"{_cell(table[name]):>{wide}}" for name in shown)
            told.append(f"  {dataset:<16}{counts[dataset]:>7}{cells}")
    images = {} if images is None else images
    if together := [name for name in images if images[name] != counts[name]]:
        drawn = ", ".join(f"{name} {images[name]:,} images of {counts[name]:,} samples" for name in together)
        told.append(f"\n  intervals resample images, each with all of its samples: {drawn}")
    if faults is not None:
        told.append("\n  unparsable: " + ", ".join(f"{name} {rate:.1%}" for name, rate in faults.items()))
    return "\n".join(told)


def _cell(score: Score) -> str:
    """Return a score as text, such as `0.7090 [0.6840, 0.7326]`."""
    digits = 2 if abs(score.value) >= 10 else 4
    if score.interval is None:
        return f"{score.value:.{digits}f}"
    low, high = score.interval
    return f"{score.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
