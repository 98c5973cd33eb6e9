"""Seg-R1's tags, parsed as its released code parses them.

Use it with `reward=seg_r1_published`, which pays what that code pays.
"""

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

# Possessive quantifiers without ambiguity: matching is linear in the text. Numbers are unsigned integers.
_NUMBER = r"\s*+\d++\s*+"
_BOX = re.compile(rf"<bbox>\s*+(\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\])\s*+</bbox>")
_POINTS = re.compile(rf"<points>\s*+(\[\s*+(?:\[{_NUMBER},{_NUMBER}\]\s*+,?+\s*+)++\])\s*+</points>")
_LABELS = re.compile(r"<labels>\s*+(\[\s*+(?:\d++\s*+,?+\s*+)++\])\s*+</labels>")
_LIST = re.compile(r"\[(?:0++|[1-9][0-9]{0,5}+)(?:,(?:0++|[1-9][0-9]{0,5}+))*+,?+\]")
_PAIRS = re.compile(rf"\[{_LIST.pattern}(?:,{_LIST.pattern})*+,?+\]")


def _squeezed(found: str) -> str:
    """Return a list without its white space; between two digits it becomes `?`, which no valid list contains.

    The released code evaluates the list as Python, where two numbers without a comma are a syntax error.
    """
    return re.sub(r"(?<=\d)\s++(?=\d)", "?", found).translate({ord(blank): None for blank in " \t\r\n\f"})


def _numbers(found: str, pattern: re.Pattern[str]) -> np.ndarray:
    """Return the numbers of a list, or of a list of pairs, as flat float64; raise Fault if malformed."""
    text = _squeezed(found)
    if pattern.fullmatch(text) is None:
        raise Fault(ParseFault.BAD_NUMBERS)
    values = [float(number) for number in text.replace("[", "").replace("]", "").split(",") if number]
    return np.array(values)


class SegR1Released:
    """The grammar of `SegR1Tags`, parsed as Seg-R1's released `grpo.py` parses it (arXiv 2506.22624).

    Numbers are unsigned integers, and a comma may end a list. Fields may stand anywhere in the text: every
    well-formed box counts, and the first well-formed points and labels. Without a closed thought the answer
    is loose: the released code pays its mask but not its format. segrl adds: labels other than 0 and 1, boxes
    without area and numbers of more than six digits are faults; coordinates outside the image are clamped to
    its border.

    Args:
        max_boxes: most boxes; more are a fault; the released code has no limit.
        max_points: likewise.
        instructions: see `SegR1Tags`.
    """

    section = SegR1Tags.section
    says = frozenset({"thought", "boxes", "points"})

    def __init__(self, max_boxes: int, max_points: int, instructions: str | Sections | None = None) -> None:
        self.tags = SegR1Tags(max_boxes, max_points, instructions)
        self.texts = self.tags.texts

    def messages(self, query: str | None) -> list[Message]:
        """Return the chat of `SegR1Tags`."""
        return self.tags.messages(query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return the completion of `SegR1Tags`. Raise ValueError where it does."""
        return self.tags.render(parsed, frame)

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Parse thought, boxes, points and labels; without a thought the answer is loose, not a fault."""
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
