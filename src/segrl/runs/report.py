"""Scores of test sets before and after a training: files, gains with intervals, tables and pictures."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from segrl.host.files import write_whole
from segrl.metrics.functional.bootstrap import paired_bootstrap
from segrl.metrics.saliency import NAMES
from segrl.protocols import SampleSet
from segrl.runs.records import clustered, clusters
from segrl.stages.base import Record
from segrl.tracking.figures import Cell, sheet
from segrl.types import MaskPrompt, Sample

_TITLES = {"iou": "IoU", "sm": "S-measure", "mae": "MAE", "fault_rate": "unparsable"}
_DRAWN = 8  # samples whose masks are kept for the picture

Scores = dict[str, dict[str, dict[str, float]]]
"""dataset -> sample id -> metric -> score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One evaluated sample, as it is saved."""

    line: dict[str, Any]
    """Its line of JSON: dataset, id, cluster, scores, text, mask prompt."""
    mask: np.ndarray | None
    """bool `[H, W]` for the first samples, which the picture shows; None for the others."""


Rows = dict[str, list[Row]]
"""dataset -> rows in the dataset's order."""


def rows(records: Mapping[str, Sequence[Record]]) -> Rows:
    """Return the rows of one rank's records."""
    return {
        name: [_row(name, record, i) for i, record in enumerate(found)] for name, found in records.items()
    }


def _row(dataset: str, record: Record, place: int) -> Row:
    line = {
        "dataset": dataset, "id": record.sample.id, **clustered(record.sample), **record.scores,
        "text": record.answer.text,
    }  # fmt: skip
    prompt = record.answer.parsed.prompt
    if prompt is not None:
        line |= {
            "boxes": prompt.boxes.tolist(),
            "points": prompt.points.tolist(),
            "labels": prompt.labels.tolist(),
        }
    return Row(line=line, mask=record.answer.mask if place < _DRAWN else None)


def interleaved(shares: Sequence[Rows]) -> Rows:
    """Return the rows of all R ranks in the dataset's order; rank r has the samples r, r + R, r + 2R ..."""
    return {
        name: [
            row for turn in zip_longest(*(share[name] for share in shares)) for row in turn if row is not None
        ]
        for name in shares[0]
    }


def save(found: Rows, path: Path) -> None:
    """Write one line of JSON per sample, and the first dataset's first masks to a .npz beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(found.values()), [])[:_DRAWN]
    np.savez_compressed(
        path.with_suffix(".npz"),
        **{str(i): row.mask for i, row in enumerate(first)},  # type: ignore[arg-type]
    )
    # The lines are written last: if they exist, the masks do.
    write_whole(path, "".join(json.dumps(row.line) + "\n" for dataset in found.values() for row in dataset))


def scores(found: Rows) -> Scores:
    """Return the scores of the rows."""
    return _scores(row.line for dataset in found.values() for row in dataset)


def _scores(lines: Iterable[Mapping[str, Any]]) -> Scores:
    table: Scores = {}
    for line in lines:
        table.setdefault(line["dataset"], {})[line["id"]] = {name: float(line[name]) for name in NAMES}
    return table


def load(path: Path) -> Scores:
    """Return the scores in a file that `save` wrote."""
    return _scores(_lines(path))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def readable(path: Path) -> Scores | None:
    """Return the scores in a file that `save` wrote, or None if it or its .npz is missing or damaged."""
    try:
        scored = load(path)
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as masks:
            drawn = [masks[name].ndim for name in masks.files]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return scored if scored and drawn and set(drawn) == {2} else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of one test set, before and after training."""

    before: float
    after: float
    gain: float
    interval: tuple[float, float]
    """95 % interval of the gain, from a paired bootstrap over images, each with all of its samples."""
    n: int
    images: int


Table = dict[str, dict[str, Comparison]]
"""dataset -> metric -> comparison."""


def check_same_samples(before: Scores, ids: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError unless `ids`, by dataset, are the ids of the samples scored before."""
    for dataset, wanted in ids.items():
        if set(wanted) != set(before.get(dataset, {})):
            raise ValueError(
                f"data.module.test.{dataset}: must hold the samples scored before "
                f"(evaluation/before.jsonl); the ids differ"
            )


def compare(before: Scores, after: Scores, seed: int, drawn: Mapping[str, np.ndarray]) -> Table:
    """Compare the mean scores before and after.

    Args:
        before: scores before the training.
        after: scores after it.
        seed: of the bootstrap.
        drawn: clusters of the samples of `after` by dataset, int64 `[samples]` in its order
            (`records.clusters`).

    Raises:
        ValueError: if the two are not scores of the same samples.
    """
    check_same_samples(before, after)
    table: Table = {}
    for dataset, scored in after.items():
        table[dataset] = {}
        for name in NAMES:
            old = np.array([before[dataset][i][name] for i in scored])
            new = np.array([scored[i][name] for i in scored])
            table[dataset][name] = Comparison(
                before=float(old.mean()),
                after=float(new.mean()),
                gain=float((new - old).mean()),
                interval=paired_bootstrap(old, new, seed, clusters=drawn[dataset]),
                n=len(new),
                images=int(drawn[dataset].max()) + 1,
            )
    return table


def conclude(folder: Path, seed: int, updates: int, rate: float, only_scenes: bool) -> Table:
    """Compare the scores of a run before and after, and print the table, also to `table.txt`.

    Where the interval of the gain in IoU includes 0, a line below the table lists possible reasons.

    Args:
        folder: run folder with `evaluation/before.jsonl` and `after.jsonl`.
        seed: of the bootstrap.
        updates: number of updates of the run.
        rate: highest learning rate of the policy.
        only_scenes: whether the policy has only seen drawn scenes, and a test set holds photographs.

    Raises:
        ValueError: if the two files do not score the same samples.
    """
    lines = {name: _lines(folder / "evaluation" / f"{name}.jsonl") for name in ("before", "after")}
    after: dict[str, list[dict[str, Any]]] = {}
    for line in lines["after"]:
        after.setdefault(line["dataset"], []).append(line)
    drawn = {dataset: clusters(found) for dataset, found in after.items()}
    table = compare(_scores(lines["before"]), _scores(lines["after"]), seed, drawn)
    texts = {(line["dataset"], line["id"]): line["text"] for line in lines["before"]}
    told = [table_text(table)]
    for dataset, metrics in table.items():
        low, high = metrics["iou"].interval
        if low <= 0 <= high:
            same = sum(line["text"] == texts[dataset, line["id"]] for line in after[dataset])
            told.append(_unmoved(dataset, same, len(after[dataset]), updates, rate, only_scenes))
    tell("\n".join(told), folder / "table.txt")
    return table


def _unmoved(dataset: str, same: int, count: int, updates: int, rate: float, only_scenes: bool) -> str:
    """Return the line of possible reasons for no gain: same answers, few updates, only drawn scenes."""
    why = (
        f"\n{dataset}: the interval of its gain in IoU contains 0. "
        f"{same} of {count} answers are the same text as before; "
        f"{updates} updates at a learning rate of at most {rate:g} "
        f"(trainer.max_steps or max_epochs, stage.optimizer.lr)"
    )
    unseen = "; this policy was trained on drawn scenes only, and these are photographs (policy=nano)"
    return why + (unseen if only_scenes else "")


def means(scores: Scores) -> dict[str, float]:
    """Return the mean of each score, by its logged name `test/<dataset>/<metric>`."""
    return {
        f"test/{dataset}/{name}": float(np.mean([row[name] for row in rows.values()]))
        for dataset, rows in scores.items()
        for name in NAMES
    }


def means_text(metrics: Mapping[str, float]) -> str:
    """Return scores as plain text, one per line."""
    return "\n".join(f"  {name:<32}{value:.4f}" for name, value in metrics.items())


def table_text(table: Table) -> str:
    """Return the comparison as a table of plain text."""
    told = []
    for dataset, metrics in table.items():
        first = next(iter(metrics.values()))
        counted = f"{first.n} held-out images"
        if first.images != first.n:
            counted = f"{first.n} held-out samples of {first.images} images, which the intervals resample"
        told.append(f"\n{dataset}, {counted}")
        told.append(f"  {'':<12}{'before':>9}{'after':>9}{'gain':>9}   95 % interval of the gain")
        told += [_row_text(name, row) for name, row in metrics.items()]
    return "\n".join(told)


def _row_text(name: str, row: Comparison) -> str:
    """Return the line of one metric; `fault_rate` is shown in percent."""
    low, high = row.interval
    if name == "fault_rate":
        scores = f"{row.before:>9.1%}{row.after:>9.1%}{row.gain:>+9.1%}"
        return f"  {_TITLES[name]:<12}{scores}   [{low:+.1%}, {high:+.1%}]"
    scores = f"{row.before:>9.3f}{row.after:>9.3f}{row.gain:>+9.3f}"
    return f"  {_TITLES[name]:<12}{scores}   [{low:+.3f}, {high:+.3f}]"


def tell(text: str, path: Path) -> None:
    """Print a text, and write it to a file."""
    print(text)
    path.write_text(text.lstrip("\n") + "\n")


def draw(samples: SampleSet, before: Path, after: Path, path: Path) -> Path:
    """Draw the first samples of a test set, with answers before and after side by side, as one PNG.

    Args:
        samples: test set.
        before: lines of the scores before; if there is no such file, only the answers after are drawn.
        after: lines of the scores after.
        path: file to write.

    Returns:
        `path`.
    """
    columns = [("after", after)] if not before.is_file() else [("before", before), ("after", after)]
    lines = {
        name: {x["id"]: x for x in map(json.loads, file.read_text().splitlines())} for name, file in columns
    }
    masks = {name: np.load(file.with_suffix(".npz"), allow_pickle=False) for name, file in columns}
    cells = []
    for i in range(min(_DRAWN, len(samples))):
        sample = samples[i]
        said = {name: lines[name][sample.id] for name, _ in columns}
        cells.append([
            _cell(sample, f"{name}: IoU {said[name]['iou']:.2f}", said[name], masks[name][str(i)])
            for name, _ in columns
        ])  # fmt: skip
    pairs = [sum(cells[i : i + 2], []) for i in range(0, len(cells), 2)]
    return sheet(pairs, path)


def _cell(sample: Sample, title: str, line: Mapping[str, object], mask: np.ndarray) -> Cell:
    prompt = MaskPrompt.of(line["boxes"], line["points"], line["labels"]) if "boxes" in line else None
    return Cell(
        image=sample.image,
        truth=sample.mask,
        mask=mask,
        prompt=prompt,
        caption=f"{title}\n{line['text']}",
    )
