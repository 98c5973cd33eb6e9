"""Print tables: scores of test sets, and their gains by a training, both with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from segrl.metrics.parts import ScoreWithInterval

_TITLES = {"iou": "IoU", "sm": "S-measure", "mae": "MAE", "fault_rate": "unparsable"}


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


def means_text(metrics: Mapping[str, float]) -> str:
    """Return scores as plain text, one per line."""
    return "\n".join(f"  {name:<32}{value:.4f}" for name, value in metrics.items())


def comparison_text(table: Table) -> str:
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


def scores_text(
    tables: dict[str, dict[str, ScoreWithInterval]],
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


def _cell(score: ScoreWithInterval) -> str:
    """Return a score as text, such as `0.7090 [0.6840, 0.7326]`."""
    digits = 2 if abs(score.value) >= 10 else 4
    if score.interval is None:
        return f"{score.value:.{digits}f}"
    low, high = score.interval
    return f"{score.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
