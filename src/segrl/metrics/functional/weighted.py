"""Weighted F-measure (Margolin et al., CVPR 2014), in which the weight of an error depends on its place.

The published definition looks up the nearest object pixel of every background pixel, but needs it only for
the blurred error of object pixels. The blur's 7x7 kernel reaches at most 3 pixels outside, so here the
look-up is restricted to that band. The distances that weigh false pixels need no look-up. Errors stay
integers until they are blurred or weighted.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

_EPS = float(np.spacing(1))
_RADIUS = 3  # pixels, of the 7x7 kernel
_FAR = 200  # pixels from the object; there the weight differs from 2 by less than 1e-12
# weights of false pixels, by squared distance
_WEIGHTS = 2 - np.exp(np.log(0.5) / 5 * np.sqrt(np.arange(_FAR**2 + 1)))
_WEIGHTS[-1] = 2
_ROWS = 32  # rows at a time, so that intermediate arrays stay in the cache
_KERNEL = np.exp(-(np.arange(-_RADIUS, _RADIUS + 1) ** 2) / (2 * 5**2))
_KERNEL /= _KERNEL.sum()
# In the band the nearest object pixel is at most sqrt(18) pixels away. Of equally near ones SciPy's transform
# returns the one in the leftmost column, and in that column the uppermost.
_REACH = 4
_NEAR = sorted(
    (dx * dx + dy * dy, dx, dy)
    for dx in range(-_REACH, _REACH + 1)
    for dy in range(-_REACH, _REACH + 1)
    if 0 < dx * dx + dy * dy <= 2 * _RADIUS**2
)


def weighted_f(saliency: UInt8[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return the weighted F-measure in [0, 1]; 0 for an empty truth.

    The map is stretched to its full range unless it is constant. As in the published code, pixels outside the
    image count as free of error, so a map that misses a truth which touches the edge scores slightly above 0.
    """
    saliency, truth = np.ascontiguousarray(saliency), np.ascontiguousarray(truth)
    objects = int(np.count_nonzero(truth))
    if objects == 0:
        return 0.0
    low, high = int(saliency.min()), int(saliency.max())
    if low == high:
        low, high = 0, 255
    scale = high - low
    missed = _missed((np.uint8(high) - saliency) * truth, truth) / scale
    false = _false((saliency - np.uint8(low)) * ~truth, truth) / scale
    hits = objects - missed
    recall, precision = 1 - missed / objects, hits / (hits + false + _EPS)
    return 2 * recall * precision / (recall + precision + _EPS)


def _false(error: UInt8[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return the error of background pixels, weighted by 1 to 2 with growing distance from the object."""
    x, y, width, height = cv2.boundingRect(error)
    if width == 0:
        return 0.0
    top, left = max(0, y - _FAR), max(0, x - _FAR)
    around = truth[top : y + height + _FAR, left : x + width + _FAR]
    inner = error[y : y + height, x : x + width]
    if not around.any():
        return 2.0 * int(inner.sum(dtype=np.int64))
    distance = cv2.distanceTransform((~around).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    distance = distance[y - top : y - top + height, x - left : x - left + width]
    total = 0.0
    for first in range(0, height, _ROWS):
        near = distance[first : first + _ROWS]
        squared = np.minimum(near * near + np.float32(0.5), np.float32(_FAR**2)).astype(np.intp)
        weights = _WEIGHTS.take(squared)
        total += float(np.dot(inner[first : first + _ROWS].astype(np.float64).ravel(), weights.ravel()))
    return total


def _missed(error: UInt8[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return the error of object pixels: of each pixel its own, or the blurred error if that is smaller.

    The blur is a Gaussian of 7x7 pixels; background pixels enter it with the error of the nearest object
    pixel.
    """
    x, y, width, height = cv2.boundingRect(error)
    if width == 0:
        return 0.0
    margin = _RADIUS + _REACH
    box = np.s_[max(0, y - margin) : y + height + margin, max(0, x - margin) : x + width + margin]
    inside, spread = np.pad(truth[box], _REACH), np.pad(error[box], _REACH)
    own = spread.astype(np.float64)
    side = 2 * _RADIUS + 1
    wanted = cv2.dilate(spread, np.ones((side, side), np.uint8)) > 0
    wanted[:_REACH] = wanted[-_REACH:] = wanted[:, :_REACH] = wanted[:, -_REACH:] = False
    _fill(spread, inside, np.flatnonzero(wanted & ~inside))
    blurred = cv2.sepFilter2D(spread, cv2.CV_64F, _KERNEL, _KERNEL, borderType=cv2.BORDER_CONSTANT)
    return float(cv2.min(own, blurred).sum())


def _fill(error: UInt8[np.ndarray, "H W"], inside: Bool[np.ndarray, "H W"], places: np.ndarray) -> None:
    """Copy to each place the error of its nearest object pixel, in place.

    Args:
        error: errors; those at `places` are replaced.
        inside: object pixels.
        places: flat indices, at least `_REACH` from each edge. One with no object pixel in `_NEAR` is kept.
    """
    values, objects, width = error.reshape(-1), inside.reshape(-1), error.shape[1]
    for _, dx, dy in _NEAR:
        if not len(places):
            return
        beside = places + (dy * width + dx)
        found = objects[beside]
        values[places[found]] = values[beside[found]]
        places = places[~found]
