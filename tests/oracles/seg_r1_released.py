"""Read a completion as Seg-R1's released reward does; written from its description, without its code.

The reward finds fields with patterns and lets Python read the lists; here `ast.literal_eval` reads them. Only
short texts are read.
"""

from __future__ import annotations

import ast
import re

NUMBER = r"\s*\d+\s*"
BOX = re.compile(rf"<bbox>\s*(\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\])\s*</bbox>")
POINTS = re.compile(rf"<points>\s*(\[\s*(?:\[{NUMBER},{NUMBER}\]\s*(?:,\s*)?)+\])\s*</points>")
LABELS = re.compile(r"<labels>\s*(\[\s*(?:\d+(?:\s*,\s*|\s+|(?=\])))+\])\s*</labels>")
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)

Read = tuple[list[list[int]], list[int], list[list[int]]]


def read(text: str) -> Read | None:
    """Return points, labels and boxes, or None where any of them is missing or no list of Python's."""
    points, labels, boxes = POINTS.search(text), LABELS.search(text), BOX.findall(text)
    try:
        said = None if points is None else ast.literal_eval(points[1])
        kinds = None if labels is None else ast.literal_eval(labels[1])
        corners = [ast.literal_eval(box) for box in boxes]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    if not said or not kinds or not corners or len(said) != len(kinds):
        return None
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in said):
        return None
    return said, kinds, corners


def format_paid(text: str) -> float:
    """Return 1 if there are points, labels, a box and a closed thought."""
    return float(read(text) is not None and THOUGHT.search(text) is not None)


def segment_paid(text: str, overlap: float, area: float) -> float:
    """Return 0.7 IoU + 0.3 (1 - area) of the mask; no thought is needed."""
    return 0.0 if read(text) is None else 0.7 * overlap + 0.3 * (1 - area)
