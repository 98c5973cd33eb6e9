"""Rewards of the mask. A completion that could not be parsed earns nothing here, whatever an empty mask would score."""

from __future__ import annotations

import numpy as np

from segrl.metrics.functional import overlap
from segrl.metrics.functional import structure as structure_measure
from segrl.types import Parsed, Sample


def iou(parsed: Parsed, text: str, mask: np.ndarray, sample: Sample) -> float:
    """Intersection over union in [0, 1]."""
    return 0.0 if parsed.fault else overlap.iou(mask, sample.mask)


def structure(parsed: Parsed, text: str, mask: np.ndarray, sample: Sample) -> float:
    """The true S-measure in [0, 1], on boolean masks."""
    return 0.0 if parsed.fault else structure_measure.structure(mask, sample.mask)


def segment_as_published(parsed: Parsed, text: str, mask: np.ndarray, sample: Sample) -> float:
    """What Seg-R1's released `segmentation_reward` computes: 0.7 IoU + 0.3 (1 - predicted area).

    Its S-measure thresholds a 0/1 truth at 128, so truth is always empty, and the S-measure of an empty truth is the
    share of pixels left alone: an area penalty, under which an empty mask earns 0.3. For comparison only.
    """
    if parsed.fault:
        return 0.0
    both, union = np.count_nonzero(mask & sample.mask), np.count_nonzero(mask | sample.mask)
    return 0.7 * (both / union if union else 0.0) + 0.3 * (1.0 - float(mask.mean()))
