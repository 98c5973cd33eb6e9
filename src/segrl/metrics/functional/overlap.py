"""Overlap of two masks: intersection, union, IoU, mean absolute error."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool


def intersection_union(
    mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], ignore: Bool[np.ndarray, "H W"] | None
) -> tuple[int, int]:
    """Return the numbers of pixels in both masks and in at least one, without ignored pixels."""
    both, either = mask & truth, mask | truth
    if ignore is not None:
        both, either = both & ~ignore, either & ~ignore
    return int(np.count_nonzero(both)), int(np.count_nonzero(either))


def iou(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return intersection over union in [0, 1]; 1 if both are empty (LISA's and gRefCOCO's convention)."""
    both, either = intersection_union(mask, truth, None)
    return both / either if either else 1.0


def mean_absolute_error(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return the share of pixels that differ, in [0, 1]: the saliency field's MAE of a binary mask."""
    return float(np.count_nonzero(mask ^ truth)) / truth.size
