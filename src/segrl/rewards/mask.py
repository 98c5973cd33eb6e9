"""Rewards of the mask.

A completion that could not be parsed earns 0, even where its empty mask would score more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from segrl.metrics.functional import overlap
from segrl.metrics.functional import structure as structure_measure
from segrl.types import Answer, Sample


def iou(answer: Answer, sample: Sample) -> float:
    """Return the IoU in [0, 1]: 0 for a fault; without one, 1 if mask and truth are both empty."""
    return 0.0 if answer.parsed.fault else overlap.iou(answer.mask, sample.mask)


def structure(answer: Answer, sample: Sample) -> float:
    """Return the S-measure in [0, 1], 0 for a fault; `segment_as_published` computes another one."""
    if answer.parsed.fault:
        return 0.0
    return structure_measure.structure(answer.mask, sample.mask)


def binary(answer: Answer, sample: Sample, *, threshold: float) -> float:
    """Return 1 if `iou` is above the threshold, else 0 (SAM-R1's ablation: 0.5, 0.7, 0.8)."""
    return float(iou(answer, sample) > threshold)


def tier(value: float, tiers: Mapping[float, float]) -> float:
    """Return the largest payment among the bounds that `value` exceeds strictly; 0 if there is none."""
    return max((paid for bound, paid in tiers.items() if value > bound), default=0.0)


def tiered(answer: Answer, sample: Sample, *, tiers: Mapping[float, float]) -> float:
    """Return the payment of the IoU's tier.

    SAM-R1 (arXiv 2505.22596, eq. 5): 4 for an IoU above 0.80, 3 in (0.70, 0.80], 2 in (0.50, 0.70], else 0.

    Args:
        answer: to be paid.
        sample: with the truth.
        tiers: bounds of the IoU and what exceeding each of them pays.
    """
    return tier(iou(answer, sample), tiers)


def tiered_potential(mask: np.ndarray, truth: np.ndarray, *, tiers: Mapping[float, float]) -> float:
    """Return the payment as `tiered` does, for two masks; used as the potential of dense rewards."""
    return tier(overlap.iou(mask, truth), tiers)


class Quantile:
    """The quantile of a reward among the latest ones: the share below it plus half of the share equal to it.

    So hard samples pay as well as easy ones. Source: Dr.Seg (arXiv 2603.00152), which ranks in a
    first-in-first-out window. Every process has its own window.

    Args:
        of: the reward that is ranked.
        window: number of latest answers that are kept.
    """

    def __init__(self, of: Callable[[Answer, Sample], float], window: int) -> None:
        self.of, self.latest = of, deque[float](maxlen=window)
        self.pending: list[float] = []

    def __call__(self, answer: Answer, sample: Sample) -> float:
        """Return the quantile in [0, 1], or the reward itself while the window is empty.

        A fault pays 0 and does not enter the window.
        """
        if answer.parsed.fault:
            return 0.0
        value = self.of(answer, sample)
        self.pending.append(value)
        if not self.latest:
            return value
        known = np.fromiter(self.latest, float)
        return float((known < value).mean() + (known == value).mean() / 2)

    def settle(self) -> None:
        """Add the rewards since the last call to the window.

        All answers of a batch are ranked against earlier batches, so equal answers earn the same.
        """
        self.latest.extend(self.pending)
        self.pending.clear()

    def remembered(self) -> list[float]:
        """Return the window, for a checkpoint."""
        return list(self.latest)

    def remember(self, values: list[float]) -> None:
        """Replace the window by `values`, the window in a checkpoint."""
        self.latest.clear()
        self.latest.extend(values)


def segment_as_published(answer: Answer, sample: Sample) -> float:
    """Return what Seg-R1's released `segmentation_reward` computes: 0.7 IoU + 0.3 (1 - predicted area).

    Its S-measure thresholds a 0/1 truth at 128, so the truth is always empty. The S-measure of an empty truth
    is the share of pixels outside the mask: an area penalty, by which an empty mask earns 0.3.
    A fault earns 0. For comparison only.
    """
    if answer.parsed.fault:
        return 0.0
    mask = answer.mask
    both, union = np.count_nonzero(mask & sample.mask), np.count_nonzero(mask | sample.mask)
    return 0.7 * (both / union if union else 0.0) + 0.3 * (1.0 - float(mask.mean()))
