"""Structure measure (Fan et al., ICCV 2017) of binary masks and of grey maps.

Means and variances are computed from integer sums over eight cells, so no float image is made and the sums
are exact. Values agree with pysodmetrics 1.6.2, with two exceptions. If the centroid lies in the last row or
column, two quadrants have no pixels: they contribute 0 here, but make the score NaN there. A quadrant in
which both maps are constant scores 1 here; there the rounding of a grey mean decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool

_EPS = float(np.spacing(1))


class Cell(NamedTuple):
    """Object (or background) pixels of one quadrant: number, sum of levels, sum of squared levels."""

    pixels: int
    total: int
    squares: int


def structure(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], alpha: float = 0.5) -> float:
    """Return the S-measure in [0, 1]: `S = α S_o + (1-α) S_r` (eq. 8).

    With an empty truth it is the share of pixels outside the mask, with a full truth the share inside.

    Args:
        mask: prediction.
        truth: ground truth.
        alpha: weight α of the object term; 0.5 in the paper.
    """
    both, quadrants = mask & truth, []
    for place in quadrants_of(truth):
        pixels, found = truth[place].size, int(np.count_nonzero(mask[place]))
        real, hits = int(np.count_nonzero(truth[place])), int(np.count_nonzero(both[place]))
        wrong = found - hits
        quadrants.append((Cell(pixels - real, wrong, wrong), Cell(real, hits, hits)))
    return structure_of_cells(quadrants, 1, alpha)


def quadrants_of(truth: Bool[np.ndarray, "H W"]) -> list[tuple[slice, slice]]:
    """Return the four quadrants around the truth's centroid, in reading order.

    The centroid's row belongs to the upper quadrants, its column to the left ones. With an empty truth only
    the first has pixels.
    """
    counts = np.ascontiguousarray(truth).view(np.uint8)
    cuts = []
    for axis in (1, 0):  # the sum along one axis gives the centroid along the other
        along = cv2.reduce(counts, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel().astype(np.int64)
        pixels = int(along.sum())
        cuts.append(round(int(along @ np.arange(len(along))) / pixels) + 1 if pixels else len(along))
    rows, columns = ((slice(None, cut), slice(cut, None)) for cut in cuts)
    return [(y, x) for y in rows for x in columns]


def structure_of_cells(quadrants: Sequence[tuple[Cell, Cell]], scale: int, alpha: float) -> float:
    """Return the S-measure from sums of levels.

    Args:
        quadrants: cells of background and object of each quadrant.
        scale: level that stands for 1.
        alpha: weight of the object term.
    """
    outside, inside = (Cell(*map(sum, zip(*side, strict=True))) for side in zip(*quadrants, strict=True))
    pixels = outside.pixels + inside.pixels
    share, mean = inside.pixels / pixels, (outside.total + inside.total) / (pixels * scale)
    if share == 0:
        return 1.0 - mean
    if share == 1:
        return mean
    left_alone = outside.pixels * scale - outside.total
    of_object = share * _evenness(inside, inside.total, scale)
    of_object += (1 - share) * _evenness(outside, left_alone, scale)
    of_region = sum((a.pixels + b.pixels) / pixels * _ssim(a, b, scale) for a, b in quadrants)
    return max(0.0, alpha * of_object + (1 - alpha) * of_region)


def _evenness(cell: Cell, total: int, scale: int) -> float:
    """Return `2m / (m² + 1 + σ)` of a cell, with n - 1 in the denominator of σ (eq. 4-7)."""
    n, deviation = cell.pixels, 0.0
    if n > 1:
        deviation = math.sqrt((n * cell.squares - cell.total**2) / (n * (n - 1))) / scale
    m = total / (n * scale)
    return 2 * m / (m * m + 1 + deviation + _EPS)


def _ssim(background: Cell, object_: Cell, scale: int) -> float:
    """Return the structural similarity of map and truth in one quadrant; 0 without pixels.

    It is SSIM without the stabilising constants (eq. 1).
    """
    n, real = background.pixels + object_.pixels, object_.pixels
    if n == 0:
        return 0.0
    total, squares = background.total + object_.total, background.squares + object_.squares
    x, y, freedom = total / (n * scale), real / n, n - 1 + _EPS
    spread = (n * squares - total**2) / (n * scale**2) / freedom + real * (n - real) / n / freedom
    covariance = (n * object_.total - real * total) / (n * scale) / freedom
    numerator, denominator = 4 * x * y * covariance, (x * x + y * y) * spread
    if numerator != 0:
        return numerator / (denominator + _EPS)
    return 1.0 if denominator == 0 else 0.0
