"""Before and after: scores of test sets, their gain with its interval, and the pictures to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segrl.metrics.functional.intervals import paired_bootstrap
from segrl.metrics.saliency import NAMES
from segrl.stages.base import Record
from segrl.tracking.figures import Cell, sheet
from segrl.types import MaskPrompt

_TITLES = {"iou": "IoU", "structure": "S-measure", "mae": "MAE", "fault_rate": "unparsable"}
_DRAWN = 8

Scores = dict[str, dict[str, dict[str, float]]]
"""dataset -> sample id -> metric -> score."""


def save(records: Mapping[str, Sequence[Record]], path: Path) -> Scores:
    """Write one JSON line per evaluated sample: dataset, id, scores, text, prompt; what of it is scores comes back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for dataset, rows in records.items():
            for row in rows:
                prompt = row.answer.parsed.prompt
                line = {"dataset": dataset, "id": row.sample.id, **row.scores, "text": row.answer.text}
                if prompt is not None:
                    line |= {
                        "boxes": prompt.boxes.tolist(),
                        "points": prompt.points.tolist(),
                        "labels": prompt.labels.tolist(),
                    }
                file.write(json.dumps(line) + "\n")
    _save_masks(records, path.with_suffix(".npz"))
    return load(path)


def _save_masks(records: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Keep the few masks that the sheet draws."""
    first = next(iter(records.values()), [])[:_DRAWN]
    np.savez_compressed(path, **{str(i): row.answer.mask for i, row in enumerate(first)})  # type: ignore[arg-type]


def load(path: Path) -> Scores:
    """The scores in a file that `save` wrote."""
    scores: Scores = {}
    for line in map(json.loads, path.read_text().splitlines()):
        scores.setdefault(line["dataset"], {})[line["id"]] = {name: float(line[name]) for name in NAMES}
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of one test set, before and after training."""

    before: float
    after: float
    gain: float
    interval: tuple[float, float]
    """Paired-bootstrap 95 % interval of the gain."""
    n: int


Table = dict[str, dict[str, Comparison]]
"""dataset -> metric -> comparison."""


def check_same_samples(before: Scores, ids: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError unless `ids` (of each dataset) are the samples scored before."""
    for dataset, wanted in ids.items():
        if set(wanted) != set(before.get(dataset, {})):
            raise ValueError(
                f"evaluation: the samples of {dataset} must be those scored before; the ids differ"
            )


def compare(before: Scores, after: Scores, seed: int) -> Table:
    """Means over the same samples; raises ValueError if the two did not score the same ones."""
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
                interval=paired_bootstrap(old, new, seed),
                n=len(new),
            )
    return table


def means(scores: Scores) -> dict[str, float]:
    """`test/<dataset>/<metric>` to its mean."""
    return {
        f"test/{dataset}/{name}": float(np.mean([row[name] for row in rows.values()]))
        for dataset, rows in scores.items()
        for name in NAMES
    }


def print_table(table: Table) -> None:
    """The comparison on stdout."""
    for dataset, metrics in table.items():
        print(f"\n{dataset}, {next(iter(metrics.values())).n} held-out images")
        print(f"  {'':<12}{'before':>9}{'after':>9}{'gain':>9}   95 % interval of the gain")
        for name, row in metrics.items():
            low, high = row.interval
            scores = f"{row.before:>9.3f}{row.after:>9.3f}{row.gain:>+9.3f}"
            print(f"  {_TITLES[name]:<12}{scores}   [{low:+.3f}, {high:+.3f}]")


def draw(records: Mapping[str, Sequence[Record]], before: Path, after: Path, path: Path) -> Path | None:
    """The first test set's first samples, before and after side by side, as one PNG; none if there is no sample."""
    rows = next(iter(records.values()), [])[:_DRAWN]
    if not rows:
        return None
    columns = [("after", after)] if not before.is_file() else [("before", before), ("after", after)]
    lines = {
        name: {x["id"]: x for x in map(json.loads, file.read_text().splitlines())} for name, file in columns
    }
    masks = {name: np.load(file.with_suffix(".npz"), allow_pickle=False) for name, file in columns}
    cells = [
        [
            _cell(
                row,
                f"{name}: IoU {lines[name][row.sample.id]['iou']:.2f}",
                lines[name][row.sample.id],
                masks[name][str(i)],
            )
            for name, _ in columns
        ]
        for i, row in enumerate(rows)
    ]
    pairs = [sum(cells[i : i + 2], []) for i in range(0, len(cells), 2)]
    return sheet(pairs, path)


def _cell(row: Record, title: str, line: Mapping[str, object], mask: np.ndarray) -> Cell:
    prompt = MaskPrompt.of(line["boxes"], line["points"], line["labels"]) if "boxes" in line else None
    return Cell(
        image=row.sample.image,
        truth=row.sample.mask,
        mask=mask,
        prompt=prompt,
        caption=f"{title}\n{line['text']}",
    )
