"""Rewards of the mask. A completion that could not be parsed earns nothing here, whatever an empty mask would score."""

from __future__ import annotations

import numpy as np

from segrl.metrics.functional import overlap
from segrl.metrics.functional import structure as structure_measure
from segrl.types import Answer, Sample


def iou(answer: Answer, sample: Sample) -> float:
    """Intersection over union in [0, 1]."""
    return 0.0 if answer.parsed.fault else overlap.iou(answer.mask, sample.mask)


def structure(answer: Answer, sample: Sample) -> float:
    """The true S-measure in [0, 1], on boolean masks."""
    if answer.parsed.fault:
        return 0.0
    return structure_measure.structure(answer.mask, sample.mask)


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
