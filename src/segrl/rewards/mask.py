"""Rewards of the mask. A completion that could not be parsed earns nothing here, whatever an empty mask would score."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from segrl.metrics.functional import overlap
from segrl.metrics.functional import structure as structure_measure
from segrl.types import Answer, Sample


def iou(answer: Answer, sample: Sample) -> float:
    """Intersection over union in [0, 1]; 1 for no object where there is none. The `linear` reward."""
    return 0.0 if answer.parsed.fault else overlap.iou(answer.mask, sample.mask)


def structure(answer: Answer, sample: Sample) -> float:
    """The true S-measure in [0, 1], on boolean masks."""
    if answer.parsed.fault:
        return 0.0
    return structure_measure.structure(answer.mask, sample.mask)


def binary(answer: Answer, sample: Sample, *, threshold: float) -> float:
    """1 for an IoU above the threshold, 0 otherwise (SAM-R1's ablation: 0.5, 0.7, 0.8)."""
    return float(iou(answer, sample) > threshold)


def tier(value: float, tiers: Mapping[float, float]) -> float:
    """What the highest bound that is passed pays; a bound itself is not passed."""
    return max((paid for bound, paid in tiers.items() if value > bound), default=0.0)


def tiered(answer: Answer, sample: Sample, *, tiers: Mapping[float, float]) -> float:
    """4 for an IoU above 0.80, 3 in (0.70, 0.80], 2 in (0.50, 0.70], 0 otherwise (SAM-R1, arXiv 2505.22596, eq. 5).

    Args:
        answer: to be paid.
        sample: with the truth.
        tiers: bound of the IoU to what passing it pays.
    """
    return tier(iou(answer, sample), tiers)


def tiered_potential(mask: np.ndarray, truth: np.ndarray, *, tiers: Mapping[float, float]) -> float:
    """As `tiered`, of masks: the potential of dense rewards."""
    return tier(overlap.iou(mask, truth), tiers)


class Quantile:
    """The share of the latest answers that a reward surpasses, ties by half: hard samples pay as well as easy ones.

    Dr.Seg (arXiv 2603.00152) ranks in a first-in-first-out window. Every rank has a window of its own.

    Args:
        of: the reward that is ranked.
        window: latest answers remembered.
    """

    def __init__(self, of: Callable[[Answer, Sample], float], window: int) -> None:
        self.of, self.latest = of, deque[float](maxlen=window)
        self.pending: list[float] = []

    def __call__(self, answer: Answer, sample: Sample) -> float:
        """In [0, 1]; before anything is remembered an answer pays its own reward. A fault pays nothing and is not remembered."""
        if answer.parsed.fault:
            return 0.0
        value = self.of(answer, sample)
        self.pending.append(value)
        if not self.latest:
            return value
        known = np.fromiter(self.latest, float)
        return float((known < value).mean() + (known == value).mean() / 2)

    def settle(self) -> None:
        """Remember what was ranked since: a group is ranked against what came before it, so equal answers earn the same."""
        self.latest.extend(self.pending)
        self.pending.clear()

    def remembered(self) -> list[float]:
        """For a checkpoint."""
        return list(self.latest)

    def remember(self, values: list[float]) -> None:
        """From a checkpoint."""
        self.latest.clear()
        self.latest.extend(values)


def segment_as_published(answer: Answer, sample: Sample) -> float:
    """What Seg-R1's released `segmentation_reward` computes: 0.7 IoU + 0.3 (1 - predicted area).

    Its S-measure thresholds a 0/1 truth at 128, so truth is always empty, and the S-measure of an empty truth is the
    share of pixels left alone: an area penalty, under which an empty mask earns 0.3. For comparison only.
    """
    if answer.parsed.fault:
        return 0.0
    mask = answer.mask
    both, union = np.count_nonzero(mask & sample.mask), np.count_nonzero(mask | sample.mask)
    return 0.7 * (both / union if union else 0.0) + 0.3 * (1.0 - float(mask.mean()))
