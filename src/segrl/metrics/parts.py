"""Scores of a set of samples, from means of what each sample contributes.

Every score of this field is a function of means over samples: the mean itself, the largest value of a mean curve, or a
ratio of two means (cIoU). So one pass over the samples gives `Parts`, their means give the scores, and means over samples
drawn anew give the intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from segrl.metrics.functional.bootstrap import bootstrap_weights

Parts = dict[str, np.ndarray]
"""What one sample contributes: by name float64 `[k]`, k = 1 or, of a curve over thresholds, 256."""

_DRAWS_AT_ONCE = 100


@runtime_checkable
class Family(Protocol):
    """A way of scoring masks."""

    @property
    def convention(self) -> str:
        """What a reader of its numbers has to know, in one line."""
        ...

    @property
    def knows_ignored(self) -> bool:
        """Whether it can leave pixels out."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the scores of `summary`, in the order of a table."""
        ...

    def parts(
        self, saliency: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None, faulty: bool = False
    ) -> Parts:
        """Of one sample.

        Args:
            saliency: map uint8 `[H, W]`; a mask is a map of 0 and 255.
            truth: bool `[H, W]`.
            ignore: bool `[H, W]`, pixels that no score looks at.
            faulty: the map is empty because an answer could not be parsed.
        """
        ...

    def summary(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Means of the parts `[..., k]` to the scores `[...]`, in the order of a table."""
        ...


class SetMeans(Metric):
    """Means of parts over a set: exact under any number of ranks and any shares, float64 sums and an int64 count.

    Args:
        sizes: of the parts, by name.
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.add_state("sums", torch.zeros(sum(sizes.values()), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, parts: Mapping[str, np.ndarray]) -> None:
        """Take in one sample."""
        row = np.concatenate([np.atleast_1d(parts[name]) for name in self.sizes])
        self.sums += torch.as_tensor(row, dtype=torch.float64, device=self.sums.device)
        self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Mean of each part, `[k]`."""
        means = (self.sums / self.count).split(list(self.sizes.values()))
        return dict(zip(self.sizes, means, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One score of a set, with the 95 % interval that drawing its clusters anew gives it."""

    value: float
    interval: tuple[float, float] | None
    """Low and high; None if no interval was asked for (`draws=0`)."""

    def as_json(self) -> dict[str, float | tuple[float, float] | None]:
        """Return value and interval; a value that is not a number is `None`."""
        return {"value": None if np.isnan(self.value) else self.value, "interval": self.interval}


def scores(
    family: Family, rows: Sequence[Parts], draws: int, seed: int, clusters: np.ndarray | None = None
) -> dict[str, Score]:
    """Return the scores of a set, by name.

    Args:
        family: which.
        rows: what each sample contributes, at least one.
        draws: resamples of the interval; 0 makes none.
        seed: of the draws.
        clusters: int64 `[samples]`, of `intervals.numbered`: samples of one cluster are drawn together, since they are not
            independent; if None, every sample is drawn by itself.
    """
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    values = family.summary({name: column.mean(0) for name, column in columns.items()})
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in values}
    weights = bootstrap_weights(len(rows), draws, seed, clusters) if draws else np.zeros((0, len(rows)))
    for start in range(0, draws, _DRAWS_AT_ONCE):
        some = weights[start : start + _DRAWS_AT_ONCE]
        for name, again in family.summary({name: some @ column for name, column in columns.items()}).items():
            drawn[name].append(again)
    table = {}
    for name, value in values.items():
        interval = None
        if draws and not np.isnan(value):
            low, high = np.nanquantile(np.concatenate(drawn[name]), [0.025, 0.975])
            interval = (float(low), float(high))
        table[name] = Score(value=float(value), interval=interval)
    return table
