"""Grammars whose answer is JSON: SAM-R1's, Seg-Zero's and VisionReasoner's.

All three have the form `<think> ... </think> ... <answer>JSON</answer>`. Text between thought and answer is
legal: SAM-R1's own prompt asks for some. JSON is parsed by `json.loads` and never evaluated. Each grammar
also accepts some deviations, marked as `Parsed.loose`: the mask counts, but no format reward is paid.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from segrl.prompts.frames import from_unit, to_unit
from segrl.prompts.instructions import Sections, chat, told
from segrl.prompts.scan import Fault, Said, fields, opened, unfolded
from segrl.protocols import Message
from segrl.types import Frame, MaskPrompt, Parsed, ParseFault

_LONGEST = 20_000  # characters; a longer answer is a fault
_LARGEST = 1e6  # largest absolute value of a coordinate
_VALUE = r"[ \t\r\n]*-?[0-9]{1,7}(?:\.[0-9]{1,7})?[ \t\r\n]*"
_STRING = re.compile(r"""\"(?:[^\"\\]|\\.)*+\"?|'(?:[^'\\]|\\.)*+'?""", re.DOTALL)
_LIST = re.compile(rf"\[((?:{_VALUE},){{2,3}}{_VALUE})\]")


def _no_constant(name: str) -> float:
    """Raise ValueError: JSON has no NaN and no Infinity, but `json.loads` accepts them."""
    raise ValueError(name)


def _in_double_quotes(found: re.Match[str]) -> str:
    """Return a quoted string as a JSON string."""
    text = found[0]
    if text[0] == '"':
        return text
    inner = text[1:-1].replace("\\'", "'").replace('\\"', '"').replace('"', '\\"')
    return f'"{inner}"'


def _load(payload: str) -> tuple[object, set[str]]:
    """Return the parsed value and its deviations from JSON: "fence" (a code fence), "quotes" (single quotes).

    Seg-Zero's instruction uses single quotes, and base models write fences. No other Python syntax is
    accepted. Raise Fault if the payload is too long or cannot be parsed.
    """
    if len(payload) > _LONGEST:
        raise Fault(ParseFault.TOO_MANY)
    how, text = set(), payload.strip()
    if text.startswith("```") and text.endswith("```") and len(text) >= 6:
        how.add("fence")
        text = text[3:-3].strip()
        text = text[4:] if text[:4].lower() == "json" else text
    for reading in ("json", "quotes"):
        try:
            return json.loads(text, parse_constant=_no_constant), how
        except (ValueError, RecursionError):
            if reading == "quotes" or "'" not in text:
                break
            text = _STRING.sub(_in_double_quotes, text)
            how.add("quotes")
    raise Fault(ParseFault.BAD_JSON)


def _outer(text: str) -> tuple[Parsed, str]:
    """Return the thought with the text around the fields, or a fault; and the content of `<answer>`."""
    thoughts = fields(text, "think", 2)
    if not thoughts:
        return Parsed(fault=ParseFault.NO_THOUGHT), ""
    thought, begin = thoughts[0].strip(), text.find("<think>")
    behind = text.find("</think>", begin) + len("</think>")
    answers = fields(text[behind:], "answer", 2)
    if not answers:
        return Parsed(thought=thought, fault=ParseFault.NO_ANSWER), ""
    if len(thoughts) > 1 or len(answers) > 1:
        return Parsed(thought=thought, fault=ParseFault.DUPLICATE_FIELD), ""
    start = text.find("<answer>", behind) + len("<answer>")
    rest = text[start + len(answers[0]) + len("</answer>") :]
    return Parsed(thought=thought, rest=f"{text[:begin].strip()} {rest.strip()}".strip()), answers[0]


def _numbers(value: object, count: int) -> list[float]:
    """Return a list of `count` finite numbers within `_LARGEST`; raise Fault for anything else."""
    if not isinstance(value, list) or len(value) != count:
        raise Fault(ParseFault.BAD_NUMBERS)
    for number in value:
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not -_LARGEST <= number <= _LARGEST
            or not math.isfinite(number)
        ):
            raise Fault(ParseFault.BAD_NUMBERS)
    return [float(number) for number in value]


def _box(value: object, frame: Frame) -> np.ndarray:
    """Return `[x1, y1, x2, y2]` as unit float32 `[4]`, clamped; raise Fault if it has no area."""
    box = to_unit(np.array(_numbers(value, 4)), frame)
    if box[2] <= box[0] or box[3] <= box[1]:
        raise Fault(ParseFault.DEGENERATE_BOX)
    return box


def _mapping(value: object) -> dict[str, Any]:
    """Return `value` if it is a JSON object; raise Fault otherwise."""
    if not isinstance(value, dict):
        raise Fault(ParseFault.BAD_JSON)
    return value


def _alone(value: object) -> tuple[dict[str, Any], bool]:
    """Return the single object, and whether it is wrapped in a list, as base models write it."""
    listed = isinstance(value, list) and len(value) == 1
    return _mapping(value[0] if isinstance(value, list) and listed else value), listed


def _said_box(one: dict[str, Any], name: str, other: str) -> tuple[object, bool]:
    """Return the value of an object's box, and whether its key is `other` instead of `name`."""
    if name not in one and other not in one:
        raise Fault(ParseFault.NO_BOX)
    return (one[name], False) if name in one else (one[other], True)


def _whole(values: np.ndarray, frame: Frame) -> list[list[int]]:
    """Return unit coordinates `[n, 2k]` as integers of the frame."""
    whole: list[list[int]] = from_unit(values, frame).tolist()
    return whole


def _written(thought: str, between: str, payload: object) -> str:
    """Return the completion around a payload. Raise ValueError if the thought holds a tag."""
    if any(f"{mark}{tag}>" in thought for mark in ("<", "</") for tag in ("think", "answer")):
        raise ValueError("thought: must be free of think and answer tags to be written; it holds one")
    text = json.dumps(payload, separators=(",", ":"))
    return f"<think> {thought} </think>{between}<answer>{text}</answer>"


def _sayable(parsed: Parsed) -> MaskPrompt:
    """Return the mask prompt. Raise ValueError if it is None or has labels other than 0 and 1."""
    if parsed.prompt is None:
        raise ValueError(f"answer: must hold a mask prompt to be written; it holds the fault {parsed.fault}")
    if not np.isin(parsed.prompt.labels, (0, 1)).all():
        raise ValueError(f"labels: must be 0 or 1 to be written; got {parsed.prompt.labels.tolist()}")
    return parsed.prompt


class SamR1Json:
    """`{"bbox": [x1,y1,x2,y2], "points": [[x,y,1], ...]}`: one object with labelled points.

    Source: SAM-R1 (arXiv 2505.22596), figure 1. Accepted as loose: a ```json fence, single quotes, a list
    around the object, `bbox_2d` for `bbox`.

    Args:
        max_points: most points; more are a fault.
        instructions: a YAML file of instruction texts, or its sections; if None, the paper's text.

    Raises:
        ValueError: if the instructions are damaged, naming file and text.
    """

    section = "sam_r1_json"
    says = frozenset({"thought", "boxes", "points", "steps"})

    def __init__(self, max_points: int, instructions: str | Sections | None = None) -> None:
        self.max_points = max_points
        self.texts = told(instructions, self.section)

    def messages(self, query: str | None) -> list[Message]:
        """Return the chat: image, then instruction with query. The paper's text has no system message."""
        return chat(self.texts, query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return the completion; raise ValueError unless there are one box and 1 to `max_points` points."""
        prompt = _sayable(parsed)
        if len(prompt.boxes) != 1 or not 1 <= len(prompt.points) <= self.max_points:
            raise ValueError(
                f"answer: must have 1 box and 1 to {self.max_points} points to be written; "
                f"got {len(prompt.boxes)} and {len(prompt.points)}"
            )
        labelled = zip(_whole(prompt.points, frame), prompt.labels.tolist(), strict=True)
        payload = {
            "bbox": opened(from_unit(prompt.boxes, frame)[0], frame),
            "points": [[*point, label] for point, label in labelled],
        }
        return _written(parsed.thought, " To generate the mask of the target object, ", payload)

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Parse thought, box and points; return the first fault if one is missing or invalid."""
        outer, payload = _outer(text)
        if outer.fault is not None:
            return outer
        try:
            value, how = _load(payload)
            answer, listed = _alone(value)
            corners, renamed = _said_box(answer, "bbox", "bbox_2d")
            if not isinstance(answer.get("points"), list) or not answer["points"]:
                raise Fault(ParseFault.NO_POINTS)
            if len(answer["points"]) > self.max_points:
                raise Fault(ParseFault.TOO_MANY)
            box = _box(corners, frame)
            triples = [_numbers(point, 3) for point in answer["points"]]
            if any(label not in (0, 1) for _, _, label in triples):
                raise Fault(ParseFault.BAD_LABEL)
        except Fault as fault:
            return replace(outer, fault=fault.kind)
        points = to_unit(np.array(triples)[:, :2], frame)
        prompt = MaskPrompt.of([box], points, [int(label) for _, _, label in triples])
        return replace(outer, prompt=prompt, loose=bool(how) or listed or renamed)

    def unfold(self, text: str, frame: Frame) -> list[tuple[int, MaskPrompt]]:
        """Return the steps of the mask prompt; a step ends with the closing bracket of its list.

        The first valid list of four numbers is the box; lists of three numbers with label 0 or 1 are points.
        """
        thought = text.find("</think>")
        begin = text.find("<answer>", thought) if thought >= 0 else -1
        if begin < 0:
            return []
        end = text.find("</answer>", begin)
        boxes: list[Said] = []
        points: list[Said] = []
        for found in _LIST.finditer(text, begin, end if end >= 0 else len(text)):
            values = [float(value) for value in found[1].split(",")]
            with suppress(Fault):
                if len(values) == 4:
                    boxes.append((found.end(), _box(values, frame), None))
                elif values[2] in (0, 1):
                    points.append(
                        (found.end(), to_unit(np.array(_numbers(values, 3)[:2]), frame), int(values[2]))
                    )
        return unfolded([*boxes[:1], *points[: self.max_points]])


class SegZeroJson:
    """`{'bbox': [...], 'points_1': [x,y], 'points_2': [x,y]}`: one object with two points inside it.

    Source: Seg-Zero (arXiv 2503.06520). A ```json fence, a list around the object and single quotes also earn
    the format reward: the released code takes the first `{...}` that it finds, and its instruction uses
    single quotes. Accepted as loose: `bbox_2d` for `bbox`.

    Args:
        instructions: see `SamR1Json`.
    """

    section = "seg_zero_json"
    says = frozenset({"thought", "boxes", "points"})

    def __init__(self, instructions: str | Sections | None = None) -> None:
        self.texts = told(instructions, self.section)

    def messages(self, query: str | None) -> list[Message]:
        """Return the chat: image, then instruction with the query in lower case, as Seg-Zero writes it."""
        return chat(self.texts, None if query is None else query.lower())

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return the completion; a single point is written twice.

        Raises:
            ValueError: unless `parsed` has one box and one or two points, all of them foreground.
        """
        prompt = _sayable(parsed)
        if len(prompt.boxes) != 1 or not 1 <= len(prompt.points) <= 2 or not prompt.labels.all():
            raise ValueError(
                "answer: must have 1 box and 1 or 2 foreground points to be written; "
                f"got {len(prompt.boxes)} and {len(prompt.points)}"
            )
        points = _whole(prompt.points, frame)
        box = opened(from_unit(prompt.boxes, frame)[0], frame)
        return _written(parsed.thought, "\n", {"bbox": box, "points_1": points[0], "points_2": points[-1]})

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Parse thought, box and two points; return the first fault if one is missing or invalid."""
        outer, payload = _outer(text)
        if outer.fault is not None:
            return outer
        try:
            answer, _ = _alone(_load(payload)[0])
            corners, renamed = _said_box(answer, "bbox", "bbox_2d")
            if "points_1" not in answer or "points_2" not in answer:
                raise Fault(ParseFault.NO_POINTS)
            box = _box(corners, frame)
            pairs = [_numbers(answer[name], 2) for name in ("points_1", "points_2")]
        except Fault as fault:
            return replace(outer, fault=fault.kind)
        prompt = MaskPrompt.of([box], to_unit(np.array(pairs), frame), [1, 1])
        return replace(outer, prompt=prompt, loose=renamed)


def _share(objects: object) -> float:
    """Return the share of boxes and points that are lists of the right length (VisionReasoner's format)."""
    if not isinstance(objects, list) or not objects:
        return 0.0
    right = [
        isinstance(one, dict) and isinstance(one.get(name), list) and len(one[name]) == count
        for one in objects
        for name, count in (("bbox_2d", 4), ("point_2d", 2))
    ]
    return sum(right) / len(right)


class VisionReasonerJson:
    """`[{"bbox_2d": [...], "point_2d": [x,y]}, ...]`: a list of objects; `[]` means that there is none.

    Source: VisionReasoner (arXiv 2505.12081). Box k and point k belong to one object, also in the mask head
    (`MaskPrompt.paired`). Accepted as loose: a ```json fence, single quotes, one object without a list,
    `bbox` for `bbox_2d`.

    Args:
        max_boxes: most objects; more are a fault.
        instructions: see `SamR1Json`.
    """

    section = "vision_reasoner_json"
    says = frozenset({"thought", "boxes", "points", "nothing"})

    def __init__(self, max_boxes: int, instructions: str | Sections | None = None) -> None:
        self.max_boxes = max_boxes
        self.texts = told(instructions, self.section)

    def messages(self, query: str | None) -> list[Message]:
        """Return the chat: image, then instruction with query."""
        return chat(self.texts, query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return the completion; box k and point k are written as one object.

        Raises:
            ValueError: unless there are as many boxes as foreground points, and at most `max_boxes`.
        """
        prompt = _sayable(parsed)
        if (
            len(prompt.boxes) != len(prompt.points)
            or len(prompt.boxes) > self.max_boxes
            or not prompt.labels.all()
        ):
            raise ValueError(
                "answer: must have as many boxes as foreground points, "
                f"at most {self.max_boxes}, to be written; "
                f"got {len(prompt.boxes)} and {len(prompt.points)}"
            )
        objects = zip(from_unit(prompt.boxes, frame), _whole(prompt.points, frame), strict=True)
        payload = [{"bbox_2d": opened(box, frame), "point_2d": point} for box, point in objects]
        return _written(parsed.thought, "\n", payload)

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Parse thought and objects, in order; return the first fault if a part is missing or invalid."""
        outer, payload = _outer(text)
        if outer.fault is not None:
            return outer
        partly = 0.0
        try:
            value, how = _load(payload)
            partly = 0.0 if how else _share(value)
            objects = [value] if isinstance(value, dict) else value
            if not isinstance(objects, list):
                raise Fault(ParseFault.BAD_JSON)
            if len(objects) > self.max_boxes:
                raise Fault(ParseFault.TOO_MANY)
            corners = [_said_box(_mapping(one), "bbox_2d", "bbox") for one in objects]
            if any("point_2d" not in one for one in objects):
                raise Fault(ParseFault.NO_POINTS)
            boxes = [_box(box, frame) for box, _ in corners]
            pairs = [_numbers(one["point_2d"], 2) for one in objects]
        except Fault as fault:
            return replace(outer, fault=fault.kind, partly=partly)
        points = to_unit(np.array(pairs).reshape(-1, 2), frame)
        prompt = MaskPrompt.of(boxes, points, [1] * len(points), paired=True)
        loose = bool(how) or isinstance(value, dict) or any(renamed for _, renamed in corners)
        return replace(outer, prompt=prompt, loose=loose, partly=partly if loose else 0.0)
