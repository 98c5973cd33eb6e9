"""Seg-R1's tags as its released code reads them: for `reward=seg_r1_published`, which pays what that code pays."""

from __future__ import annotations

import re
from itertools import islice

import numpy as np

from segrl.prompts.frames import to_unit
from segrl.prompts.instructions import Sections
from segrl.prompts.scan import Fault, fields
from segrl.prompts.tags import SegR1Tags
from segrl.protocols import Message
from segrl.types import Frame, MaskPrompt, Parsed, ParseFault

# Possessive, and no two ways to read one text: linear, whatever the text. Numbers are whole and have no sign.
_NUMBER = r"\s*+\d++\s*+"
_BOX = re.compile(rf"<bbox>\s*+(\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\])\s*+</bbox>")
_POINTS = re.compile(rf"<points>\s*+(\[\s*+(?:\[{_NUMBER},{_NUMBER}\]\s*+,?+\s*+)++\])\s*+</points>")
_LABELS = re.compile(r"<labels>\s*+(\[\s*+(?:\d++\s*+,?+\s*+)++\])\s*+</labels>")
_LIST = re.compile(r"\[(?:0++|[1-9][0-9]{0,5}+)(?:,(?:0++|[1-9][0-9]{0,5}+))*+,?+\]")
_PAIRS = re.compile(rf"\[{_LIST.pattern}(?:,{_LIST.pattern})*+,?+\]")


def _squeezed(found: str) -> str:
    """Return a list without its white space, which the patterns above leave around punctuation or between numbers.

    Between two numbers it becomes a mark that no list holds: there Python, which the released code asks, sees no list.
    """
    return re.sub(r"(?<=\d)\s++(?=\d)", "?", found).translate({ord(blank): None for blank in " \t\r\n\f"})


def _numbers(found: str, pattern: re.Pattern[str]) -> np.ndarray:
    """Return the numbers of a list, or of a list of pairs `[n, 2]`, float64."""
    text = _squeezed(found)
    if pattern.fullmatch(text) is None:
        raise Fault(ParseFault.BAD_NUMBERS)
    values = [float(number) for number in text.replace("[", "").replace("]", "").split(",") if number]
    return np.array(values)


class SegR1Released:
    """What `SegR1Tags` asks and writes, read as Seg-R1's released `grpo.py` reads it (arXiv 2506.22624).

    Whole numbers without a sign; fields are looked for anywhere in the text, and the first points and labels that are
    well-formed count, with every well-formed box; a comma may close a list. Without a closed thought the answer is read
    loosely: that code pays its mask and not its format. segrl's own: labels other than 0 and 1, boxes without area, and
    numbers of more than six digits are faults, and coordinates outside the image are clamped to its border.

    Args:
        max_boxes: more are a fault; the released code has no limit.
        max_points: likewise.
        instructions: see `SegR1Tags`.
    """

    section = SegR1Tags.section
    says = frozenset({"thought", "boxes", "points"})

    def __init__(self, max_boxes: int, max_points: int, instructions: str | Sections | None = None) -> None:
        self.tags = SegR1Tags(max_boxes, max_points, instructions)
        self.texts = self.tags.texts

    def messages(self, query: str | None) -> list[Message]:
        """Return what `SegR1Tags` asks."""
        return self.tags.messages(query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return what `SegR1Tags` writes; raises ValueError where it cannot."""
        return self.tags.render(parsed, frame)

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Read boxes, points and labels; a thought is not needed."""
        thoughts = fields(text, "think", 1)
        thought = thoughts[0].strip() if thoughts else ""
        try:
            prompt = self._prompt(text, frame)
        except Fault as fault:
            return Parsed(thought=thought, fault=fault.kind)
        return Parsed(thought=thought, prompt=prompt, loose=not thoughts)

    def _prompt(self, text: str, frame: Frame) -> MaskPrompt:
        points, labels = _POINTS.search(text), _LABELS.search(text)
        found = [box[1] for box in islice(_BOX.finditer(text), self.tags.max_boxes + 1)]
        if not found:
            raise Fault(ParseFault.NO_BOX)
        if points is None:
            raise Fault(ParseFault.NO_POINTS)
        if labels is None:
            raise Fault(ParseFault.NO_LABELS)
        if len(found) > self.tags.max_boxes or points[1].count("[") > self.tags.max_points + 1:
            raise Fault(ParseFault.TOO_MANY)
        boxes = to_unit(np.stack([_numbers(box, _LIST) for box in found]), frame)
        kinds, pairs = _numbers(labels[1], _LIST), _numbers(points[1], _PAIRS).reshape(-1, 2)
        if len(kinds) != len(pairs):
            raise Fault(ParseFault.LABEL_COUNT)
        if not np.isin(kinds, (0, 1)).all():
            raise Fault(ParseFault.BAD_LABEL)
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise Fault(ParseFault.DEGENERATE_BOX)
        return MaskPrompt.of(boxes, to_unit(pairs, frame), kinds)
