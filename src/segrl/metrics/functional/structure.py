"""Structure measure (Fan et al., ICCV 2017) of binary masks.

All means and variances of a 0/1 map follow from four counts, so no float image is ever made. Values agree with
pysodmetrics 1.6.2, but for one documented difference: where the centroid lies in the last row or column, two
quadrants have no pixels; they contribute nothing here, and make the whole score NaN there.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

_EPS = float(np.spacing(1))


def structure(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], alpha: float = 0.5) -> float:
    r"""\( S = \alpha S_o + (1-\alpha) S_r \) in [0, 1] (eq. 8).

    Empty truth scores the share of pixels left alone; full truth the share of pixels found.

    Args:
        mask: prediction.
        truth: ground truth.
        alpha: weight of the object term; 0.5 in the paper and all its users.
    """
    share = float(truth.mean())
    if share == 0:
        return 1.0 - float(mask.mean())
    if share == 1:
        return float(mask.mean())
    return max(0.0, alpha * _object(mask, truth, share) + (1 - alpha) * _region(mask, truth))


def _object(mask: np.ndarray, truth: np.ndarray, share: float) -> float:
    """Similarity inside and outside the object, weighted by area (eq. 4-7)."""
    inside, outside = mask[truth], ~mask[~truth]
    return share * _evenness(inside) + (1 - share) * _evenness(outside)


def _evenness(values: np.ndarray) -> float:
    r"""\( 2m / (m^2 + 1 + \sigma) \) of 0/1 values, deviation with n-1 in the denominator."""
    n, m = values.size, float(values.mean())
    deviation = float(np.sqrt(n * m * (1 - m) / (n - 1))) if n > 1 else 0.0
    return 2 * m / (m * m + 1 + deviation + _EPS)


def _region(mask: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of the four quadrants around the truth's centroid, weighted by area (eq. 1-3)."""
    rows, columns = np.nonzero(truth)
    cut_y, cut_x = int(np.round(rows.mean())) + 1, int(np.round(columns.mean())) + 1
    total = 0.0
    for y in (slice(None, cut_y), slice(cut_y, None)):
        for x in (slice(None, cut_x), slice(cut_x, None)):
            quadrant = truth[y, x]
            if quadrant.size:
                total += quadrant.size / truth.size * _ssim(mask[y, x], quadrant)
    return total


def _ssim(mask: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of two 0/1 maps, without the constants (eq. 1)."""
    n = truth.size
    x, y = np.count_nonzero(mask) / n, np.count_nonzero(truth) / n
    both = np.count_nonzero(mask & truth)
    scale = n / (n - 1 + _EPS)
    spread = scale * (x * (1 - x) + y * (1 - y))
    covariance = scale * (both / n - x * y)
    numerator, denominator = 4 * x * y * covariance, (x * x + y * y) * spread
    if numerator != 0:
        return float(numerator / (denominator + _EPS))
    return 1.0 if denominator == 0 else 0.0
