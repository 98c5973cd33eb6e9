"""The grammars that answer in JSON: SAM-R1's, Seg-Zero's and VisionReasoner's.

All three are `<think> ... </think> ... <answer>JSON</answer>`. Whatever stands between thought and answer is legal: SAM-R1's own
prompt asks for words there. JSON is read by the standard library's linear scanner and never evaluated.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from typing import Any

import numpy as np

from segrl.prompts import instructions
from segrl.prompts.frames import from_unit, to_unit
from segrl.prompts.scan import Fault, Said, fields, opened, unfolded
from segrl.protocols import Message
from segrl.types import Frame, MaskPrompt, Parsed, ParseFault

_LONGEST = 20_000  # characters of an answer; a box of numbers is never longer
_LARGEST = 1e6
_VALUE = r"[ \t\r\n]*-?[0-9]{1,7}(?:\.[0-9]{1,7})?[ \t\r\n]*"
_LIST = re.compile(rf"\[((?:{_VALUE},){{2,3}}{_VALUE})\]")


def _no_constant(name: str) -> float:
    """JSON has no NaN and no Infinity, whatever Python's reader thinks."""
    raise ValueError(name)


def _load(payload: str) -> object:
    """The JSON value; single quotes are read as double ones where there are no double ones (Seg-Zero asks for them)."""
    if len(payload) > _LONGEST:
        raise Fault(ParseFault.TOO_MANY)
    text = payload.replace("'", '"') if '"' not in payload else payload
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Fault(ParseFault.BAD_JSON) from None


def _split(text: str) -> tuple[str, str, str]:
    """Thought, payload, and what follows the answer."""
    thoughts = fields(text, "think", 2)
    if not thoughts:
        raise Fault(ParseFault.NO_THOUGHT)
    behind = text.find("</think>", text.find("<think>")) + len("</think>")
    answers = fields(text[behind:], "answer", 2)
    if not answers:
        raise Fault(ParseFault.NO_ANSWER)
    if len(thoughts) > 1 or len(answers) > 1:
        raise Fault(ParseFault.DUPLICATE_FIELD)
    start = text.find("<answer>", behind) + len("<answer>")
    rest = text[start + len(answers[0]) + len("</answer>") :].strip()
    return thoughts[0].strip(), answers[0], rest


def _numbers(value: object, count: int) -> list[float]:
    """A list of so many finite numbers of sane size."""
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
    """`[x1, y1, x2, y2]` to unit float32 `[4]`, clamped into the image."""
    box = to_unit(np.array(_numbers(value, 4)), frame)
    if box[2] <= box[0] or box[3] <= box[1]:
        raise Fault(ParseFault.DEGENERATE_BOX)
    return box


def _mapping(value: object) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise Fault(ParseFault.BAD_JSON)
    return value


def _whole(values: np.ndarray, frame: Frame) -> list[list[int]]:
    """Unit coordinates `[n, 2k]` to integers of the frame."""
    whole: list[list[int]] = from_unit(values, frame).tolist()
    return whole


def _written(thought: str, between: str, payload: object) -> str:
    """The completion around a payload; raises ValueError if the thought holds a tag."""
    if any(f"{mark}{tag}>" in thought for mark in ("<", "</") for tag in ("think", "answer")):
        raise ValueError(
            "a thought without think and answer tags is needed to write a completion; it holds one"
        )
    text = json.dumps(payload, separators=(",", ":"))
    return f"<think> {thought} </think>{between}<answer>{text}</answer>"


def _sayable(parsed: Parsed) -> MaskPrompt:
    """Its mask prompt; raises ValueError where there is none, or its labels are no labels."""
    if parsed.prompt is None:
        raise ValueError(f"a mask prompt is needed to write a completion; got the fault {parsed.fault}")
    if not np.isin(parsed.prompt.labels, (0, 1)).all():
        raise ValueError(
            f"labels 0 and 1 are needed to write a completion; got {parsed.prompt.labels.tolist()}"
        )
    return parsed.prompt


def _ask(text: str, query: str | None) -> list[Message]:
    """One user message: image, then text."""
    what = (query or "").strip().rstrip(".").strip() or instructions.NO_QUERY
    said = text.replace("{Question}", what)
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said}]}]


class SamR1Json:
    """`{"bbox": [x1,y1,x2,y2], "points": [[x,y,1], ...]}`: one object, points labelled (SAM-R1, arXiv 2505.22596, figure 1).

    Args:
        max_points: more are a fault.
    """

    says = frozenset({"thought", "boxes", "points", "steps"})

    def __init__(self, max_points: int) -> None:
        self.max_points = max_points

    def messages(self, query: str | None) -> list[Message]:
        """Image, then the instruction around the query; no system message of its own."""
        return _ask(instructions.SAM_R1_USER, query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Raises ValueError unless `parsed` has one box and 1 to `max_points` points."""
        prompt = _sayable(parsed)
        if len(prompt.boxes) != 1 or not 1 <= len(prompt.points) <= self.max_points:
            raise ValueError(
                f"1 box and 1 to {self.max_points} points are needed to write a completion; "
                f"got {len(prompt.boxes)} and {len(prompt.points)}"
            )
        labelled = zip(_whole(prompt.points, frame), prompt.labels.tolist(), strict=True)
        payload = {
            "bbox": opened(from_unit(prompt.boxes, frame)[0], frame),
            "points": [[*point, label] for point, label in labelled],
        }
        return _written(parsed.thought, " To generate the mask of the target object, ", payload)

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Read thought, box and points; all are needed."""
        thought = ""
        try:
            thought, payload, rest = _split(text)
            answer = _mapping(_load(payload))
            if "bbox" not in answer:
                raise Fault(ParseFault.NO_BOX)
            if not isinstance(answer.get("points"), list) or not answer["points"]:
                raise Fault(ParseFault.NO_POINTS)
            if len(answer["points"]) > self.max_points:
                raise Fault(ParseFault.TOO_MANY)
            box = _box(answer["bbox"], frame)
            triples = [_numbers(point, 3) for point in answer["points"]]
            if any(label not in (0, 1) for _, _, label in triples):
                raise Fault(ParseFault.BAD_LABEL)
        except Fault as fault:
            return Parsed(thought=thought, fault=fault.kind)
        points = to_unit(np.array(triples)[:, :2], frame)
        prompt = MaskPrompt.of([box], points, [int(label) for _, _, label in triples])
        return Parsed(thought=thought, prompt=prompt, rest=rest)

    def unfold(self, text: str, frame: Frame) -> list[tuple[int, MaskPrompt]]:
        """The first list of four numbers is the box, lists of three are points; each is complete where it closes."""
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
    """`{'bbox': [...], 'points_1': [x,y], 'points_2': [x,y]}`: one object, two points inside it (Seg-Zero, arXiv 2503.06520)."""

    says = frozenset({"thought", "boxes", "points"})

    def messages(self, query: str | None) -> list[Message]:
        """Image, then the instruction around the query, which Seg-Zero writes in lower case."""
        return _ask(instructions.SEG_ZERO_USER, None if query is None else query.lower())

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """A single point is said twice. Raises ValueError unless `parsed` has one box and one or two points, all inside."""
        prompt = _sayable(parsed)
        if len(prompt.boxes) != 1 or not 1 <= len(prompt.points) <= 2 or not prompt.labels.all():
            raise ValueError(
                f"1 box and 1 or 2 foreground points are needed to write a completion; got {len(prompt.boxes)} and {len(prompt.points)}"
            )
        points = _whole(prompt.points, frame)
        box = opened(from_unit(prompt.boxes, frame)[0], frame)
        return _written(parsed.thought, "\n", {"bbox": box, "points_1": points[0], "points_2": points[-1]})

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Read thought, box and two points; all are needed."""
        thought = ""
        try:
            thought, payload, rest = _split(text)
            answer = _mapping(_load(payload))
            if "bbox" not in answer:
                raise Fault(ParseFault.NO_BOX)
            if "points_1" not in answer or "points_2" not in answer:
                raise Fault(ParseFault.NO_POINTS)
            box = _box(answer["bbox"], frame)
            pairs = [_numbers(answer[name], 2) for name in ("points_1", "points_2")]
        except Fault as fault:
            return Parsed(thought=thought, fault=fault.kind)
        prompt = MaskPrompt.of([box], to_unit(np.array(pairs), frame), [1, 1])
        return Parsed(thought=thought, prompt=prompt, rest=rest)


class VisionReasonerJson:
    """`[{"bbox_2d": [...], "point_2d": [x,y]}, ...]`: any number of objects; `[]` says that there is none (arXiv 2505.12081).

    Args:
        max_boxes: more are a fault.
    """

    says = frozenset({"thought", "boxes", "points", "nothing"})

    def __init__(self, max_boxes: int) -> None:
        self.max_boxes = max_boxes

    def messages(self, query: str | None) -> list[Message]:
        """Image, then the instruction around the query."""
        return _ask(instructions.VISION_REASONER_USER, query)

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Box k and point k are one object. Raises ValueError unless there are as many boxes as foreground points."""
        prompt = _sayable(parsed)
        if (
            len(prompt.boxes) != len(prompt.points)
            or len(prompt.boxes) > self.max_boxes
            or not prompt.labels.all()
        ):
            raise ValueError(
                f"as many boxes as foreground points, at most {self.max_boxes}, are needed to write a completion; "
                f"got {len(prompt.boxes)} and {len(prompt.points)}"
            )
        objects = zip(from_unit(prompt.boxes, frame), _whole(prompt.points, frame), strict=True)
        payload = [{"bbox_2d": opened(box, frame), "point_2d": point} for box, point in objects]
        return _written(parsed.thought, "\n", payload)

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Read thought and objects, in the order written."""
        thought = ""
        try:
            thought, payload, rest = _split(text)
            objects = _load(payload)
            if not isinstance(objects, list):
                raise Fault(ParseFault.BAD_JSON)
            if len(objects) > self.max_boxes:
                raise Fault(ParseFault.TOO_MANY)
            if any("bbox_2d" not in _mapping(one) for one in objects):
                raise Fault(ParseFault.NO_BOX)
            if any("point_2d" not in one for one in objects):
                raise Fault(ParseFault.NO_POINTS)
            boxes = [_box(one["bbox_2d"], frame) for one in objects]
            pairs = [_numbers(one["point_2d"], 2) for one in objects]
        except Fault as fault:
            return Parsed(thought=thought, fault=fault.kind)
        points = to_unit(np.array(pairs).reshape(-1, 2), frame)
        return Parsed(thought=thought, prompt=MaskPrompt.of(boxes, points, [1] * len(points)), rest=rest)
