"""Scores of a mask's outline: boundary IoU, mean boundary accuracy, human correction effort."""

from __future__ import annotations

import math

import cv2
import numpy as np
from jaxtyping import Bool, Int32

_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_RELAX = 5  # pixels of tolerance along outlines; thinner errors need no click
_TOLERANCE = 2.0  # pixels: largest distance between an outline and its polygon


def boundary_iou(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return the boundary IoU in [0, 1]: the IoU of the two masks' inner rims; 1 if both are empty.

    Source: Cheng et al., CVPR 2021. A rim is 2 % of the image's diagonal wide. The image's edge counts as
    outline, so every mask that is not empty has a rim.
    """
    width = max(1, round(0.02 * math.hypot(*truth.shape)))
    ours, real = _rim(mask, width), _rim(truth, width)
    either = int(np.count_nonzero(ours | real))
    return int(np.count_nonzero(ours & real)) / either if either else 1.0


def boundary_accuracy(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return the mean boundary accuracy (MBA): the share of right pixels near the truth's outline.

    Source: Cheng et al., CVPR 2020. It is the mean over five widths, whose radii grow from 1 towards (H + W)
    / 300 pixels. A truth without an outline (empty or full) gives 1 if the mask equals it, else 0;
    CascadePSP's code divides by zero there.
    """
    right, most = mask == truth, sum(truth.shape) / 300
    shares, shape = [], np.ascontiguousarray(truth).view(np.uint8)
    for step in range(5):
        radius = 1 + int((most - 1) / 5 * step)
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        near = cv2.morphologyEx(shape, cv2.MORPH_GRADIENT, disk).view(bool)
        pixels = int(np.count_nonzero(near))
        if pixels == 0:
            return float(right.all())
        shares.append(int(np.count_nonzero(right & near)) / pixels)
    return sum(shares) / 5


def correction_effort(mask: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> int:
    """Return the human correction effort (HCE): clicks that turn the mask into the truth.

    Clicks are corners of outlines to redraw, and regions to fill or delete. Source: Qin et al., ECCV 2022,
    with the published tolerances. HCE grows with resolution, so both masks must have the truth's original
    size. Binarise a grey map with `segrl.metrics.functional.tally.above_half`.
    """
    hit, false, missed = mask & truth, mask & ~truth, truth & ~mask
    core = cv2.erode((mask | truth).view(np.uint8), _CROSS, iterations=_RELAX).view(bool)
    false = false & _grown(false & core, ~truth)
    missed = missed & _grown(missed & core, ~mask)
    missed |= _skeleton(truth) & ~hit  # the erosion removes thin parts
    return _clicks(false, hit | missed) + _clicks(missed, ~(hit | false | missed))


def _rim(mask: Bool[np.ndarray, "H W"], width: int) -> Bool[np.ndarray, "H W"]:
    """Return the pixels of a mask within `width` of its outline; outside the image there is no object."""
    side = 2 * width + 1
    inner = cv2.erode(
        np.ascontiguousarray(mask).view(np.uint8),
        np.ones((side, side), np.uint8),
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return np.asarray(mask & ~inner.view(bool))


def _grown(mask: Bool[np.ndarray, "H W"], within: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return a mask dilated by `_RELAX` pixels, restricted to `within` after every step."""
    grown: Bool[np.ndarray, "H W"] = mask
    for _ in range(_RELAX):
        grown = cv2.dilate(grown.view(np.uint8), _CROSS).view(bool) & within
    return grown


def _skeleton(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return the mask thinned to lines (Zhang and Suen 1984)."""
    from skimage.morphology import skeletonize

    x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    thin = np.zeros(mask.shape, bool)
    if width:
        thin[y : y + height, x : x + width] = skeletonize(  # type: ignore[no-untyped-call]
            mask[y : y + height, x : x + width]
        )
    return thin


def _clicks(wrong: Bool[np.ndarray, "H W"], around: Bool[np.ndarray, "H W"]) -> int:
    """Return the clicks that correct the regions of `wrong`.

    They are the corners of outlines that touch `around`, and one for each region that does not touch it.
    """
    regions, labelled = cv2.connectedComponents(wrong.view(np.uint8), connectivity=8)
    contours, _ = cv2.findContours(wrong.view(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return 0
    points = np.concatenate([contour[:, 0] for contour in contours])
    flat = points[:, 1] * wrong.shape[1] + points[:, 0]
    counts = cv2.dilate(around.view(np.uint8), _CROSS).ravel()[flat] > 0
    # a pixel counts once: at its first occurrence in the outlines
    chosen = np.flatnonzero(counts)
    first = chosen[np.unique(flat[chosen], return_index=True)[1]]
    counts[:] = False
    counts[first] = True
    touched = len(np.unique(labelled.ravel()[flat[counts]]))
    corners, start = 0, 0
    for contour in contours:
        end = start + len(contour)
        corners += sum(
            len(cv2.approxPolyDP(line, _TOLERANCE, False)) for line in _lines(contour, counts[start:end])
        )
        start = end
    return corners + regions - 1 - touched


def _lines(
    contour: Int32[np.ndarray, "n 1 2"], counts: Bool[np.ndarray, "n"]
) -> list[Int32[np.ndarray, "m 1 2"]]:
    """Return the stretches of an outline that count.

    If the ends of the first and the last stretch are neighbours, they are joined, with the first one
    reversed.
    """
    edges = np.diff(counts.astype(np.int8), prepend=0, append=0)
    lines = [
        contour[a:b] for a, b in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)
    ]
    if len(lines) > 1 and np.abs(lines[0][0] - lines[-1][-1]).max() == 1:
        lines[-1] = np.concatenate([lines[-1], lines.pop(0)[::-1]])
    return lines
