"""What the grammars share: finding fields in linear time, and faults on their way to `parse`."""

from __future__ import annotations

import numpy as np

from segrl.types import Frame, ParseFault


class Fault(Exception):
    """Carries a fault from the scanners to `parse`; never leaves `prompts`."""

    def __init__(self, kind: ParseFault) -> None:
        self.kind = kind


def spans(text: str, tag: str) -> list[tuple[int, int]]:
    """Where the content of every closed `<tag>...</tag>` begins and ends, in order."""
    opening, closing, found, at = f"<{tag}>", f"</{tag}>", [], 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        found.append((start + len(opening), end))
        at = end + len(closing)
    return found


def fields(text: str, tag: str) -> list[str]:
    """Those contents."""
    return [text[start:end] for start, end in spans(text, tag)]


def opened(box: np.ndarray, frame: Frame) -> list[int]:
    """Integer corners with at least one unit between them: rounding may not close a thin box."""
    low = np.minimum(box[:2], np.array([frame.width, frame.height]) - 1)
    corners: list[int] = np.concatenate([low, np.maximum(box[2:], low + 1)]).astype(int).tolist()
    return corners
