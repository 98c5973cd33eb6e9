"""Scores of a set of samples with bootstrap intervals, as functions of means of per-sample parts.

Every score here is a function of means over samples: a mean, the mean or the largest value of a mean curve,
or a ratio of two means (cIoU). One pass over the samples gives their `Parts`. Means of the parts give the
scores; means over resampled samples give the intervals.
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
"""Contributions of one sample by name: float64 `[k]` with k = 1, or 256 for a curve over thresholds."""

_DRAWS_AT_ONCE = 100


@runtime_checkable
class ScoreFamily(Protocol):
    """A way of scoring masks."""

    @property
    def convention(self) -> str:
        """One line about the conventions that a reader of the scores must know."""
        ...

    @property
    def knows_ignored(self) -> bool:
        """Whether `parts` accepts ignored pixels."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scores of `summary`, in the order of a table."""
        ...

    def parts(
        self, saliency: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None, faulty: bool = False
    ) -> Parts:
        """Return the parts of one sample.

        Args:
            saliency: map uint8 `[H, W]`; a mask is a map of 0 and 255.
            truth: bool `[H, W]`.
            ignore: bool `[H, W]`, pixels to leave out; None if all count.
            faulty: whether the map is empty because the answer could not be parsed.
        """
        ...

    def summary(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the scores `[...]` from means of the parts `[..., k]`, in the order of a table."""
        ...


class RunningMeans(Metric):
    """Means of parts over a set, from float64 sums and an int64 count that ranks add up.

    The result does not depend on how samples are spread over ranks, up to float64 rounding.

    Args:
        sizes: lengths of the parts by name.
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
        """Add the parts of one sample."""
        row = np.concatenate([np.atleast_1d(parts[name]) for name in self.sizes])
        self.sums += torch.as_tensor(row, dtype=torch.float64, device=self.sums.device)
        self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each part, `[k]`."""
        means = (self.sums / self.count).split(list(self.sizes.values()))
        return dict(zip(self.sizes, means, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreWithInterval:
    """One score of a set, with its 95 % percentile bootstrap interval over clusters."""

    value: float
    interval: tuple[float, float] | None
    """Low and high; None with `draws=0`, or if the value is NaN."""

    def as_json(self) -> dict[str, float | tuple[float, float] | None]:
        """Return value and interval; NaN becomes None."""
        return {"value": None if np.isnan(self.value) else self.value, "interval": self.interval}


def scores(
    family: ScoreFamily, rows: Sequence[Parts], draws: int, seed: int, clusters: np.ndarray | None = None
) -> dict[str, ScoreWithInterval]:
    """Return the scores of a set by name.

    Args:
        family: way of scoring.
        rows: parts of each sample, at least one.
        draws: number of resamples for the interval; with 0 there is no interval.
        seed: of the resamples.
        clusters: int64 `[samples]` from `bootstrap.numbered`. Samples of one cluster are not independent, so
            they are drawn together; if None, every sample is drawn by itself.
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
        table[name] = ScoreWithInterval(value=float(value), interval=interval)
    return table
