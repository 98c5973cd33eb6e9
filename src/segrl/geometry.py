"""Box, innermost point and connected components of a mask."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, label


def tight_box(mask: np.ndarray) -> np.ndarray:
    """Return the tight unit box, float32 `[4]` (x1 y1 x2 y2), of a mask bool `[H, W]`.

    Raises:
        ValueError: if the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        raise ValueError("mask: must hold an object to draw a box around; it is empty")
    height, width = mask.shape
    corners = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return np.array(corners, np.float32)


def inner_point(mask: np.ndarray) -> np.ndarray:
    """Return the unit centre, float32 `[2]` (x y), of the largest circle inside a mask bool `[H, W]`.

    Raises:
        ValueError: if the mask is empty.
    """
    if not mask.any():
        raise ValueError("mask: must hold an object to put a point into; it is empty")
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), mask.shape)
    return np.array(((column + 0.5) / mask.shape[1], (row + 0.5) / mask.shape[0]), np.float32)


def components(mask: np.ndarray, least: float, most: int) -> list[np.ndarray]:
    """Return the largest 4-connected components of a mask bool `[H, W]`, largest first, at most `most`.

    Each covers at least the share `least` of the image; if none does, return the largest one alone.
    """
    labelled, _ = label(mask)
    areas = np.bincount(labelled.ravel())
    areas[0] = 0
    largest = [int(i) for i in np.argsort(-areas, kind="stable")[:most] if areas[i]]
    chosen = [i for i in largest if areas[i] >= least * mask.size] or largest[:1]
    return [labelled == i for i in chosen]
