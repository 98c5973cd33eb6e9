"""Pictures: overlays of masks and mask prompts, sheets of them, and curves of scalars."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segrl.types import MaskPrompt

_CELL, _CAPTION, _MARGIN = 240, 86, 8
_PREDICTED, _TRUTH, _BOX = np.array([255, 64, 64]), np.array([64, 255, 96]), (255, 214, 0)
_POINT = {1: (0, 200, 255), 0: (255, 0, 255)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One picture of a sheet."""

    image: np.ndarray
    """uint8 `[H, W, 3]`."""
    truth: np.ndarray | None = None
    """bool `[H, W]`, drawn as an outline."""
    mask: np.ndarray | None = None
    """bool `[H, W]`, drawn as a tint."""
    prompt: MaskPrompt | None = None
    caption: str = ""


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return the true pixels that have a false pixel above, below, left or right."""
    inner = np.pad(mask, 1)
    return mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])


def _square(pixels: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((_CELL, _CELL), resample))


def _resized_mask(mask: np.ndarray) -> np.ndarray:
    return _square(mask.astype(np.uint8) * 255, Image.Resampling.NEAREST) > 127


def draw(cell: Cell) -> Image.Image:
    """Draw image, tinted mask, outlined truth, boxes, points, and the caption below."""
    pixels = _square(cell.image, Image.Resampling.BILINEAR).astype(np.float32)
    if cell.mask is not None:
        tinted = _resized_mask(cell.mask)
        pixels[tinted] = 0.55 * pixels[tinted] + 0.45 * _PREDICTED
    if cell.truth is not None:
        pixels[_outline(_resized_mask(cell.truth))] = _TRUTH
    canvas = Image.new("RGB", (_CELL, _CELL + _CAPTION), "white")
    canvas.paste(Image.fromarray(pixels.astype(np.uint8)), (0, 0))
    pen = ImageDraw.Draw(canvas)
    if cell.prompt is not None:
        for box in cell.prompt.boxes * (_CELL - 1):
            pen.rectangle(box.tolist(), outline=_BOX, width=2)
        for (x, y), label in zip(cell.prompt.points * (_CELL - 1), cell.prompt.labels, strict=True):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_POINT[int(label)], outline="black")
    lines = [line for part in cell.caption.split("\n") for line in textwrap.wrap(part, 40) or [""]]
    pen.multiline_text(
        (2, _CELL + 3), "\n".join(lines[:6]), fill="black", font=ImageFont.load_default(size=11), spacing=2
    )
    return canvas


def sheet(rows: Sequence[Sequence[Cell]], path: Path) -> Path:
    """Write rows of cells as one PNG, and return its path.

    Colours: green outline, truth; red, predicted mask; yellow, boxes; blue, foreground points; pink,
    background points.
    """
    wide, high = _CELL + _MARGIN, _CELL + _CAPTION + _MARGIN
    page = Image.new(
        "RGB", (max(len(row) for row in rows) * wide + _MARGIN, len(rows) * high + _MARGIN), "white"
    )
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            page.paste(draw(cell), (c * wide + _MARGIN, r * high + _MARGIN))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the running mean; at the ends it is taken over the values inside the window."""
    ones = np.ones(window)
    smoothed: np.ndarray = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    return smoothed


def curves(history: Sequence[dict[str, float]], names: Sequence[str], path: Path) -> Path | None:
    """Write each named scalar over updates, raw and smoothed, as one PNG; return None if none was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in names if any(name in line for line in history)]
    if not shown:
        return None
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(shown):
        lines = [line for line in history if name in line]
        steps = np.array([line["step"] for line in lines])
        values = np.array([line[name] for line in lines], np.float64)
        axes = figure.add_subplot(1, len(shown), place + 1)
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values, max(1, len(values) // 20)), color="tab:blue")
        axes.set_title(name)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
