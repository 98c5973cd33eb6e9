"""Seg-R1's grammars: `<think> <bbox> <points> <labels>`, and the points and labels of its pre-RL stage.

Parsing uses `str.find`, `str.split` and patterns without ambiguous repetition, so it is linear in the text
(the released parser is exponential on an unterminated run of digits). Nothing is evaluated.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import numpy as np

from segrl.prompts.frames import from_unit, to_unit
from segrl.prompts.instructions import Sections, chat, told
from segrl.prompts.scan import Fault, Said, fields, opened, spans, unfolded
from segrl.protocols import Message
from segrl.types import Frame, MaskPrompt, Parsed, ParseFault

_NUMBER = r"(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_PAIR = re.compile(rf"{_NUMBER},{_NUMBER}")
_POINT = re.compile(rf"\[{_NUMBER},{_NUMBER}\]")
_ONE = r"([01])(?:\.0{1,6})?"
_WHOLE = re.compile(_ONE)
_LABEL = re.compile(rf"{_ONE}\s*[,\]]")
_LABELS = re.compile(rf"\s*\[\s*(?:{_ONE}\s*[,\]]\s*){{1,64}}")


def _rest(text: str) -> str:
    """Return the text behind the last closed field, or the whole text if no field is closed.

    A closing tag without an opening tag is no field. A single full stop is dropped: the instruction's example
    has one.
    """
    ends = [end + len(f"</{tag}>") for tag in ("bbox", "points", "labels") for _, end in spans(text, tag)]
    rest = text[max(ends, default=0) :].strip()
    return "" if rest == "." else rest


def _only(text: str, tag: str, missing: ParseFault) -> str:
    """Return the content of the single `<tag>`; raise Fault if it is missing or duplicated."""
    match fields(text, tag, 2):
        case []:
            raise Fault(missing)
        case [content]:
            return content
        case _:
            raise Fault(ParseFault.DUPLICATE_FIELD)


def _squeeze(content: str) -> str:
    """Return the content without white space; between two digits a space stays, so the number is invalid."""
    words = content.split()
    kept = [
        b if not (a[-1].isdigit() and b[0].isdigit()) else f" {b}"
        for a, b in zip(words, words[1:], strict=False)
    ]
    return "".join([*words[:1], *kept])


def _read_box(content: str, frame: Frame) -> np.ndarray:
    """Return `[x1,y1,x2,y2]` as unit float32 `[4]`; raise Fault if it is malformed or has no area."""
    match = _BOX.fullmatch(_squeeze(content))
    if match is None:
        raise Fault(ParseFault.BAD_NUMBERS)
    box = to_unit(np.array([float(v) for v in match.groups()]), frame)
    if box[2] <= box[0] or box[3] <= box[1]:
        raise Fault(ParseFault.DEGENERATE_BOX)
    return box


def _read_points(text: str, frame: Frame, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points and labels as unit float32 `[Q, 2]` and int64 `[Q]`; raise Fault if they are invalid."""
    points = _squeeze(_only(text, "points", ParseFault.NO_POINTS))
    labels = _squeeze(_only(text, "labels", ParseFault.NO_LABELS))
    if not (
        points.startswith("[[") and points.endswith("]]") and labels.startswith("[") and labels.endswith("]")
    ):
        raise Fault(ParseFault.BAD_NUMBERS)
    if points.count("[") > limit + 1:
        raise Fault(ParseFault.TOO_MANY)
    pairs = [_PAIR.fullmatch(pair) for pair in points[2:-2].split("],[")]
    if any(pair is None for pair in pairs):
        raise Fault(ParseFault.BAD_NUMBERS)
    values = labels[1:-1].split(",")
    if any(_WHOLE.fullmatch(value) is None for value in values):
        raise Fault(ParseFault.BAD_LABEL)
    if len(values) != len(pairs):
        raise Fault(ParseFault.LABEL_COUNT)
    xy = np.array([[float(v) for v in pair.groups()] for pair in pairs if pair is not None])
    return to_unit(xy, frame), np.array([int(value[0]) for value in values], np.int64)


def _write_points(prompt: MaskPrompt, frame: Frame, between: str, limit: int) -> str:
    """Return the points and labels fields, joined by `between`; raise ValueError if they are invalid."""
    if not 1 <= len(prompt.points) <= limit:
        raise ValueError(f"answer: must have 1 to {limit} points to be written; got {len(prompt.points)}")
    if not np.isin(prompt.labels, (0, 1)).all():
        raise ValueError(f"labels: must be 0 or 1 to be written; got {prompt.labels.tolist()}")
    pairs = ",".join(f"[{x},{y}]" for x, y in from_unit(prompt.points, frame).tolist())
    labels = ",".join(str(v) for v in prompt.labels.tolist())
    return f"<points>[{pairs}]</points>{between}<labels>[{labels}]</labels>"


class SegR1Tags:
    """`<think> </think> <bbox>[x1,y1,x2,y2]</bbox>, <points>[[x,y],...]</points>, <labels>[1,...]</labels>`.

    Each object has a `<bbox>` field; one list of points serves all objects. Coordinates outside the image are
    clamped to its border. Text before the thought is legal, as in the released code.
    Source: Seg-R1 (arXiv 2506.22624), released `grpo.py`.

    Args:
        max_boxes: most boxes; more are a fault (each box is one more mask to decode).
        max_points: most points; more are a fault.
        instructions: a YAML file of instruction texts, or its sections; if None, segrl's own texts.

    Raises:
        ValueError: if the instructions are damaged, naming file and text.
    """

    section = "seg_r1_tags"
    says = frozenset({"thought", "boxes", "points", "steps"})

    def __init__(self, max_boxes: int, max_points: int, instructions: str | Sections | None = None) -> None:
        self.max_boxes = max_boxes
        self.max_points = max_points
        self.texts = told(instructions, self.section)

    def messages(self, query: str | None) -> list[Message]:
        """Return the chat: system message, then image before text, as in SFT, RL and evaluation."""
        return chat(self.texts, query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return the completion.

        Raises:
            ValueError: if this grammar could not parse it back: no mask prompt, too few or too many boxes or
                points, labels other than 0 and 1, or a think tag in the thought.
        """
        if parsed.prompt is None:
            raise ValueError(
                f"answer: must hold a mask prompt to be written; it holds the fault {parsed.fault}"
            )
        if not 1 <= len(parsed.prompt.boxes) <= self.max_boxes:
            raise ValueError(
                f"answer: must have 1 to {self.max_boxes} boxes to be written; got {len(parsed.prompt.boxes)}"
            )
        if "<think>" in parsed.thought or "</think>" in parsed.thought:
            raise ValueError("thought: must be free of think tags to be written; it holds one")
        boxes = ", ".join(
            "<bbox>[{},{},{},{}]</bbox>".format(*opened(box, frame))
            for box in from_unit(parsed.prompt.boxes, frame)
        )
        points = _write_points(parsed.prompt, frame, ", ", self.max_points)
        return f"<think> {parsed.thought} </think> {boxes}, {points}"

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Parse thought, boxes, points and labels; return the first fault if one is missing or invalid."""
        thoughts = fields(text, "think", 2)
        if len(thoughts) != 1:
            kind = ParseFault.DUPLICATE_FIELD if thoughts else ParseFault.NO_THOUGHT
            return Parsed(thought=thoughts[0].strip() if thoughts else "", fault=kind)
        begin = text.find("<think>")
        answer = text[text.find("</think>", begin) + len("</think>") :]
        outer = Parsed(thought=thoughts[0].strip(), rest=_rest(answer))
        try:
            if not answer.strip():
                raise Fault(ParseFault.NO_ANSWER)
            boxes = fields(answer, "bbox", self.max_boxes + 1)
            if not boxes:
                raise Fault(ParseFault.NO_BOX)
            if len(boxes) > self.max_boxes:
                raise Fault(ParseFault.TOO_MANY)
            corners = [_read_box(box, frame) for box in boxes]
            points, labels = _read_points(answer, frame, self.max_points)
        except Fault as fault:
            return replace(outer, fault=fault.kind)
        return replace(outer, prompt=MaskPrompt.of(corners, points, labels))

    def unfold(self, text: str, frame: Frame) -> list[tuple[int, MaskPrompt]]:
        """Return the steps of the mask prompt.

        A box ends with its closing tag, a point with the comma or bracket behind its label.
        """
        begin = text.find("</think>")
        if begin < 0:
            return []
        said: list[Said] = []
        for start, end in islice(spans(text, "bbox", begin), self.max_boxes):
            with suppress(Fault):
                said.append((end + len("</bbox>"), _read_box(text[start:end], frame), None))
        for start, end in islice(spans(text, "points", begin), 1):
            pairs = [[float(v) for v in pair] for pair in _POINT.findall(_squeeze(text[start:end]))]
            opening = text.find("<labels>", end)
            listed = _LABELS.match(text, opening + len("<labels>")) if opening >= 0 else None
            labels = _LABEL.finditer(text, *listed.span()) if listed is not None else iter(())
            for pair, label in zip(pairs[: self.max_points], labels, strict=False):
                said.append((label.end(), to_unit(np.array(pair), frame), int(label[1])))
        return unfolded(said)


class SegR1Points:
    """`<points>[[x,y],...]</points> <labels>[1,0,...]</labels>`: the grammar of Seg-R1's pre-RL stage.

    Text before the points is legal, as in the released code: this grammar has no field for a thought.

    Args:
        max_points: most points; more are a fault.
        instructions: see `SegR1Tags`.
    """

    section = "seg_r1_points"
    says = frozenset({"points"})

    def __init__(self, max_points: int, instructions: str | Sections | None = None) -> None:
        self.max_points = max_points
        self.texts = told(instructions, self.section)

    def messages(self, query: str | None) -> list[Message]:
        """Return the chat: image, then text. segrl's own texts have no system message."""
        return chat(self.texts, query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return points and labels without boxes and thought; raise ValueError if they are invalid."""
        if parsed.prompt is None:
            raise ValueError(
                f"answer: must hold a mask prompt to be written; it holds the fault {parsed.fault}"
            )
        return _write_points(parsed.prompt, frame, " ", self.max_points)

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Parse points and labels; return the first fault, such as another number of labels than points."""
        try:
            points, labels = _read_points(text, frame, self.max_points)
        except Fault as fault:
            return Parsed(fault=fault.kind)
        return Parsed(prompt=MaskPrompt.of((), points, labels), rest=_rest(text))
