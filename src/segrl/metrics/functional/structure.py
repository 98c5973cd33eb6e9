"""Structure measure (Fan et al., ICCV 2017): one arithmetic for binary masks and for grey maps.

All means and variances follow from sums of integers over eight cells, so no float image is made and nothing is rounded
before the last division. Values agree with pysodmetrics 1.6.2, but for two differences: where the centroid lies in the
last row or column, two quadrants have no pixels, and contribute nothing here, but make the whole score NaN there; and a
quadrant where both maps are constant counts as alike, where rounding of a grey mean decides there.
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
    """The pixels of one quadrant on one side of the truth: how many, the sum of their levels and of the squares."""

    pixels: int
    total: int
    squares: int


def structure(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], alpha: float = 0.5) -> float:
    r"""\( S = \alpha S_o + (1-\alpha) S_r \) in [0, 1] (eq. 8).

    Empty truth scores the share of pixels left alone; full truth the share of pixels found.

    Args:
        mask: prediction.
        truth: ground truth.
        alpha: weight of the object term; 0.5 in the paper and all its users.
    """
    both, quadrants = mask & truth, []
    for place in quadrants_of(truth):
        pixels, found = truth[place].size, int(np.count_nonzero(mask[place]))
        real, hits = int(np.count_nonzero(truth[place])), int(np.count_nonzero(both[place]))
        wrong = found - hits
        quadrants.append((Cell(pixels - real, wrong, wrong), Cell(real, hits, hits)))
    return structure_of_cells(quadrants, 1, alpha)


def quadrants_of(truth: Bool[np.ndarray, "H W"]) -> list[tuple[slice, slice]]:
    """The four parts around the truth's centroid, in reading order; its own row and column go to the first of them."""
    counts = np.ascontiguousarray(truth).view(np.uint8)
    cuts = []
    for axis in (1, 0):  # the sum along one axis gives the centroid on the other
        along = cv2.reduce(counts, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel().astype(np.int64)
        pixels = int(along.sum())
        cuts.append(round(int(along @ np.arange(len(along))) / pixels) + 1 if pixels else len(along))
    rows, columns = ((slice(None, cut), slice(cut, None)) for cut in cuts)
    return [(y, x) for y in rows for x in columns]


def structure_of_cells(quadrants: Sequence[tuple[Cell, Cell]], scale: int, alpha: float) -> float:
    """As `structure`, from sums of levels.

    Args:
        quadrants: per quadrant the cells of background and of object.
        scale: the level that means 1.
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
    r"""\( 2m / (m^2 + 1 + \sigma) \), deviation with n-1 in the denominator (eq. 4-7)."""
    n, deviation = cell.pixels, 0.0
    if n > 1:
        deviation = math.sqrt((n * cell.squares - cell.total**2) / (n * (n - 1))) / scale
    m = total / (n * scale)
    return 2 * m / (m * m + 1 + deviation + _EPS)


def _ssim(background: Cell, object_: Cell, scale: int) -> float:
    """Structural similarity of the map and the truth in one quadrant, without the constants (eq. 1); 0 without pixels."""
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
