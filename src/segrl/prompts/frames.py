"""Conversion between unit coordinates and the coordinates that a model family writes."""

from __future__ import annotations

import numpy as np

from segrl.types import Frame


def absolute_pixels(height: int, width: int) -> Frame:
    """Return Qwen2.5-VL's frame: pixels of the image as its processor resized it (768 becomes 756)."""
    return Frame(width=width, height=height)


def permille(height: int, width: int) -> Frame:
    """Return Qwen3-VL's frame: 0 to 1000 along each side, for every image size."""
    return Frame(width=1000, height=1000)


def to_unit(coordinates: np.ndarray, frame: Frame) -> np.ndarray:
    """Return frame coordinates `[..., 2k]` (x y x y ...) as unit float32, clamped into the image."""
    extent = np.resize(np.array([frame.width, frame.height], np.float64), coordinates.shape[-1])
    return np.clip(np.asarray(coordinates, np.float64) / extent, 0.0, 1.0).astype(np.float32)


def from_unit(coordinates: np.ndarray, frame: Frame) -> np.ndarray:
    """Return unit coordinates `[..., 2k]` as the nearest integers of the frame, int64."""
    extent = np.resize(np.array([frame.width, frame.height], np.float64), coordinates.shape[-1])
    return np.rint(np.asarray(coordinates, np.float64) * extent).astype(np.int64)
