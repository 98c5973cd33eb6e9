"""What a mask looks like: its box, its innermost point, its parts."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, label


def tight_box(mask: np.ndarray) -> np.ndarray:
    """Unit box float32 `[4]` around the true pixels of bool `[H, W]`; raises ValueError on an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        raise ValueError("an object is needed to draw a box around; the mask is empty")
    height, width = mask.shape
    corners = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return np.array(corners, np.float32)


def inner_point(mask: np.ndarray) -> np.ndarray:
    """Unit centre float32 `[2]` of the largest circle inside the true pixels of bool `[H, W]`; raises ValueError on an empty mask."""
    if not mask.any():
        raise ValueError("an object is needed to put a point into; the mask is empty")
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), mask.shape)
    return np.array(((column + 0.5) / mask.shape[1], (row + 0.5) / mask.shape[0]), np.float32)


def components(mask: np.ndarray, least: float, most: int) -> list[np.ndarray]:
    """The largest connected parts, at most `most`, each covering at least the share `least` of the image."""
    labelled, _ = label(mask)
    areas = np.bincount(labelled.ravel())
    areas[0] = 0
    largest = [int(i) for i in np.argsort(-areas, kind="stable")[:most] if areas[i]]
    chosen = [i for i in largest if areas[i] >= least * mask.size] or largest[:1]
    return [labelled == i for i in chosen]
