"""How much two masks overlap, pixel by pixel."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool


def iou(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Intersection over union in [0, 1]; 1 where both are empty (LISA's and gRefCOCO's convention)."""
    union = int(np.count_nonzero(mask | truth))
    return int(np.count_nonzero(mask & truth)) / union if union else 1.0


def mean_absolute_error(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Share of pixels that differ, in [0, 1]: the saliency field's MAE on a binary prediction."""
    return float(np.count_nonzero(mask ^ truth)) / truth.size
