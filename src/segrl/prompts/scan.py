"""What the grammars share: finding fields in linear time, and faults on their way to `parse`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from segrl.types import Frame, MaskPrompt, ParseFault


class Fault(Exception):
    """Carries a fault from the scanners to `parse`; never leaves `prompts`."""

    def __init__(self, kind: ParseFault) -> None:
        self.kind = kind


Said = tuple[int, np.ndarray, int | None]
"""Where a box, or a point, is complete in the text; its unit coordinates; the point's label."""


def unfolded(said: Sequence[Said]) -> list[tuple[int, MaskPrompt]]:
    """The mask prompt as it grows: at each end, all that is complete by then."""
    steps = []
    for end, _, _ in sorted(said, key=lambda one: one[0]):
        known = [one for one in said if one[0] <= end]
        boxes = [xy for _, xy, label in known if label is None]
        points = [(xy, label) for _, xy, label in known if label is not None]
        steps.append((end, MaskPrompt.of(boxes, [xy for xy, _ in points], [label for _, label in points])))
    return steps


def spans(text: str, tag: str, at: int = 0) -> Iterator[tuple[int, int]]:
    """Where the content of every closed `<tag>...</tag>` behind `at` begins and ends, in order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        yield start + len(opening), end
        at = end + len(closing)


def fields(text: str, tag: str, most: int) -> list[str]:
    """The first `most` of those contents: whoever allows n asks for n + 1, and reads no further."""
    return [text[start:end] for start, end in islice(spans(text, tag), most)]


def opened(box: np.ndarray, frame: Frame) -> list[int]:
    """Integer corners with at least one unit between them: rounding may not close a thin box."""
    low = np.minimum(box[:2], np.array([frame.width, frame.height]) - 1)
    corners: list[int] = np.concatenate([low, np.maximum(box[2:], low + 1)]).astype(int).tolist()
    return corners
