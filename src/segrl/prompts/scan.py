"""Functions that grammars share: find fields in linear time, round boxes, list steps of a mask prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from segrl.types import Frame, MaskPrompt, ParseFault


class Fault(Exception):
    """Exception that carries a `ParseFault` from a scanner to `parse` or `unfold`, which catch it."""

    def __init__(self, kind: ParseFault) -> None:
        self.kind = kind


Said = tuple[int, np.ndarray, int | None]
"""End of a box or point in the text; its unit coordinates; the label of a point, None for a box."""


def unfolded(said: Sequence[Said]) -> list[tuple[int, MaskPrompt]]:
    """Return the steps of the mask prompt: each end with all boxes and points that are complete there."""
    steps = []
    for end, _, _ in sorted(said, key=lambda one: one[0]):
        known = [one for one in said if one[0] <= end]
        boxes = [xy for _, xy, label in known if label is None]
        points = [(xy, label) for _, xy, label in known if label is not None]
        steps.append((end, MaskPrompt.of(boxes, [xy for xy, _ in points], [label for _, label in points])))
    return steps


def spans(text: str, tag: str, at: int = 0) -> Iterator[tuple[int, int]]:
    """Yield start and end of the content of every closed `<tag>...</tag>` from `at` on, in order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        yield start + len(opening), end
        at = end + len(closing)


def fields(text: str, tag: str, most: int) -> list[str]:
    """Return the first `most` of these contents; to detect more than n fields, ask for n + 1."""
    return [text[start:end] for start, end in islice(spans(text, tag), most)]


def opened(box: np.ndarray, frame: Frame) -> list[int]:
    """Return integer corners at least one unit apart: rounding must not close a thin box."""
    low = np.minimum(box[:2], np.array([frame.width, frame.height]) - 1)
    corners: list[int] = np.concatenate([low, np.maximum(box[2:], low + 1)]).astype(int).tolist()
    return corners
