"""Scores of a grey map that are functions of its histograms: MAE, S-measure, E-measure, F-measure.

A map and its truth are counted once, into eight histograms; every score is computed from these 2048 numbers.
Definitions are those of pysodmetrics 1.6.2 with `normalize=True`: a map is stretched so that its smallest
value is 0 and its largest 1, unless it is constant. Integer sums are exact, so no rounding decides which
values reach the adaptive threshold (twice the mean, at most 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from segrl.metrics.functional.structure import Cell, quadrants_of, structure_of_cells

_EPS = float(np.spacing(1))
_MOST = 2**24  # pixels counted at once: cv2.calcHist counts in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Histograms of a map, by quadrant around the truth's centroid and by background or object.

    Example: for a map of two object pixels with values 0 and 255 in the first quadrant,
    `counts[0, 1, 0] == counts[0, 1, 255] == 1`, and all other counts are 0.
    """

    counts: Int64[np.ndarray, "4 2 256"]  # quadrants in reading order; background, object; value


def tally(saliency: UInt8[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> Tally:
    """Return the histograms of a map against its truth."""
    grey, side = np.ascontiguousarray(saliency), np.ascontiguousarray(truth).view(np.uint8)
    rows = max(1, _MOST // max(1, grey.shape[1]))
    counts = np.zeros((4, 2, 256), np.int64)
    for quadrant, (y, x) in enumerate(quadrants_of(truth)):
        for first in range(0, len(grey[y]), rows):
            part = [array[y, x][first : first + rows] for array in (grey, side)]
            if part[0].size:
                found = cv2.calcHist(part, [0, 1], None, [256, 2], [0, 256, 0, 2])
                counts[quadrant] += found.T.astype(np.int64)
    return Tally(counts=counts)


def above_half(saliency: UInt8[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return the mask of the values above one half, after the map is stretched."""
    low, scale = _stretch(int(saliency.min()), int(saliency.max()))
    return np.asarray(saliency > low + scale // 2)


def mean_absolute_error(t: Tally) -> float:
    """Return the mean absolute difference of map and truth, in [0, 1]."""
    levels, scale = _levels(t)
    background, object_ = t.counts.sum(0)
    return int(background @ levels + object_ @ (scale - levels)) / (scale * int(t.counts.sum()))


def structure(t: Tally, alpha: float = 0.5) -> float:
    """Return the S-measure; see `segrl.metrics.functional.structure`."""
    levels, scale = _levels(t)
    sums = t.counts @ np.stack([np.ones_like(levels), levels, levels**2], 1)
    return structure_of_cells([(Cell(*a), Cell(*b)) for a, b in sums.tolist()], scale, alpha)


def e_measure(t: Tally) -> tuple[float, Float64[np.ndarray, "256"]]:
    """Return the E-measure at the adaptive threshold, and at every threshold from 255 down to 0.

    Source: Fan et al., IJCAI 2018. The sum over n pixels is divided by n - 1, as in the authors' MATLAB code:
    a perfect map scores n / (n - 1). At the adaptive threshold a map of zeros counts as all object, as in
    pysodmetrics.
    """
    wrong, hits = _at_or_above(t)
    missed, spared = (int(side.sum()) for side in t.counts.sum(0)[::-1])
    pixels = missed + spared
    found, share = wrong + hits, missed / pixels
    if share == 0:
        aligned = (pixels - found).astype(np.float64)
    elif share == 1:
        aligned = found.astype(np.float64)
    else:
        mean, aligned = found / pixels, np.zeros(len(found))
        for map_, truth, count in (
            (1 - mean, 1 - share, hits),
            (1 - mean, -share, wrong),
            (-mean, 1 - share, missed - hits),
            (-mean, -share, spared - wrong),
        ):
            aligned += (2 * map_ * truth / (map_**2 + truth**2 + _EPS) + 1) ** 2 / 4 * count
    scores = aligned / (pixels - 1 + _EPS)
    return float(scores[256]), scores[:256]


def f_measure(t: Tally, beta2: float = 0.3) -> tuple[float, Float64[np.ndarray, "256"]]:
    """Return the F-measure at the adaptive threshold, and at every threshold from 255 down to 0.

    Source: Achanta et al., CVPR 2009. Without a hit it is 0, so it is 0 for every map if the truth is empty.

    Args:
        t: histograms.
        beta2: β² in `(1 + β²) precision recall / (β² precision + recall)`; 0.3 in the field.
    """
    wrong, hits = _at_or_above(t)
    precision = hits / np.maximum(wrong + hits, 1)
    recall = hits / max(1, int(t.counts[:, 1].sum()))
    scores = (1 + beta2) * precision * recall / np.where(hits > 0, beta2 * precision + recall, 1.0)
    return float(scores[256]), scores[:256]


def _stretch(low: int, high: int) -> tuple[int, int]:
    """Return the value that becomes 0 and its distance to the value that becomes 1; (0, 255) if constant."""
    return (low, high - low) if low < high else (0, 255)


def _range(t: Tally) -> tuple[int, int]:
    """Return `_stretch` of the smallest and the largest value that occur."""
    present = np.flatnonzero(t.counts.any((0, 1)))
    return _stretch(int(present[0]), int(present[-1]))


def _levels(t: Tally) -> tuple[Int64[np.ndarray, "256"], int]:
    """Return the stretched level of each value, as integers, and the integer that stands for 1."""
    low, scale = _range(t)
    return np.clip(np.arange(256) - low, 0, scale), scale


def _at_or_above(t: Tally) -> tuple[Int64[np.ndarray, "257"], Int64[np.ndarray, "257"]]:
    """Return the numbers of background and of object pixels at or above each threshold.

    Thresholds run from 255 down to 0; the last entry is for the adaptive one.
    """
    (low, scale), levels, sides = _range(t), _levels(t)[0], t.counts.sum(0)
    # in floats, as pysodmetrics: a value that rounds to below an integer falls to the next lower threshold
    values = np.arange(256) / 255
    stretched = np.clip((values - values[low]) / (values[low + scale] - values[low]), 0, 1)
    above = np.zeros((2, 257), np.int64)
    places = 255 - (stretched * 255).astype(np.int64)
    for side, counts in zip(above, sides, strict=True):
        np.add.at(side, places, counts)
    above[:, :256] = above[:, :256].cumsum(1)
    pixels = int(sides.sum())
    adaptive = levels * pixels >= min(2 * int(sides.sum(0) @ levels), scale * pixels)
    above[:, 256] = sides[:, adaptive].sum(1)
    return above[0], above[1]
