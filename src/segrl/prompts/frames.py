"""Unit coordinates to what a model family writes, and back: one conversion per family."""

from __future__ import annotations

import numpy as np

from segrl.types import Frame


def absolute_pixels(height: int, width: int) -> Frame:
    """Qwen2.5-VL's frame: pixels of the image as the processor resized it (756 for 768, not 768)."""
    return Frame(width=width, height=height)


def permille(height: int, width: int) -> Frame:
    """Qwen3-VL's frame: 0..1000 along each side, whatever the image's size."""
    return Frame(width=1000, height=1000)


def to_unit(coordinates: np.ndarray, frame: Frame) -> np.ndarray:
    """Frame coordinates `[..., 2k]` (x y x y ...) to unit ones, clamped into the image; float32."""
    extent = np.resize(np.array([frame.width, frame.height], np.float64), coordinates.shape[-1])
    return np.clip(np.asarray(coordinates, np.float64) / extent, 0.0, 1.0).astype(np.float32)


def from_unit(coordinates: np.ndarray, frame: Frame) -> np.ndarray:
    """Unit coordinates `[..., 2k]` to the nearest integers of the frame; int64."""
    extent = np.resize(np.array([frame.width, frame.height], np.float64), coordinates.shape[-1])
    return np.rint(np.asarray(coordinates, np.float64) * extent).astype(np.int64)
