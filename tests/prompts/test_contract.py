"""The contract that every grammar satisfies; six grammars are tested."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrl.prompts.answer_json import SamR1Json, SegZeroJson, VisionReasonerJson
from segrl.prompts.frames import absolute_pixels, permille
from segrl.prompts.released import SegR1Released
from segrl.prompts.tags import SegR1Points, SegR1Tags
from segrl.protocols import Grammar, Unfolding
from segrl.types import Frame, MaskPrompt, Parsed, ParseFault


@dataclass(frozen=True)
class Case:
    """A grammar and its bounds: the fewest and most boxes and points."""

    grammar: Grammar
    boxes: tuple[int, int]
    points: tuple[int, int]
    background: bool = True
    paired: bool = False
    """Whether each box has its point."""


CASES = {
    "seg_r1_tags": Case(SegR1Tags(max_boxes=3, max_points=4), (1, 3), (1, 4)),
    "seg_r1_released": Case(SegR1Released(max_boxes=3, max_points=4), (1, 3), (1, 4)),
    "seg_r1_points": Case(SegR1Points(max_points=4), (0, 0), (1, 4)),
    "sam_r1_json": Case(SamR1Json(max_points=4), (1, 1), (1, 4)),
    "seg_zero_json": Case(SegZeroJson(), (1, 1), (2, 2), background=False),
    "vision_reasoner_json": Case(
        VisionReasonerJson(max_boxes=3), (0, 3), (0, 3), background=False, paired=True
    ),
}
every_grammar = pytest.mark.parametrize("name", CASES)
TAGS = [f"<{slash}{tag}>" for tag in ("think", "answer", "bbox", "points", "labels") for slash in ("", "/")]


# --- what is said is heard


def frames() -> st.SearchStrategy[Frame]:
    """Draw a frame of either family; a resized image may have any side, odd ones too."""
    side = st.integers(28, 2000)
    return st.builds(absolute_pixels, side, side) | st.builds(permille, side, side)


@st.composite
def corners(draw: st.DrawFn, extent: int) -> tuple[float, float]:
    """Draw two sides of a box in unit coordinates whose nearest integers of the frame differ."""
    low = draw(st.integers(0, extent - 1))
    high = draw(st.integers(low + 1, extent))
    first, second = ((whole + draw(st.floats(-0.49, 0.49))) / extent for whole in (low, high))
    return max(first, 0.0), min(second, 1.0)


@st.composite
def said(draw: st.DrawFn, case: Case) -> tuple[Frame, Parsed]:
    """Draw a frame and a mask prompt that the grammar can write."""
    frame = draw(frames())
    boxes = []
    for _ in range(draw(st.integers(*case.boxes))):
        (x1, x2), (y1, y2) = draw(corners(int(frame.width))), draw(corners(int(frame.height)))
        boxes.append([x1, y1, x2, y2])
    count = len(boxes) if case.paired else draw(st.integers(*case.points))
    unit = st.floats(0, 1, width=32)
    points = draw(st.lists(st.tuples(unit, unit), min_size=count, max_size=count))
    label = st.integers(0, 1) if case.background else st.just(1)
    labels = draw(st.lists(label, min_size=count, max_size=count))
    any_letter = st.characters(exclude_categories=())
    words = st.text(any_letter, max_size=30) | st.sampled_from(
        ["[1,2]", '{"bbox":[1,2,3,4]}', "<bbox>", "<", "\u202e x"]
    )
    thought = draw(words) if "thought" in case.grammar.says else ""
    return frame, Parsed(thought=thought, prompt=MaskPrompt.of(boxes, points, labels))


def in_frame_units(left: np.ndarray, right: np.ndarray, frame: Frame) -> float:
    """Return the largest distance of two lists of unit coordinates, in units of the frame."""
    extent = np.resize([frame.width, frame.height], left.shape[-1])
    return float(np.max(np.abs(left.astype(np.float64) - right) * extent, initial=0.0))


@every_grammar
@given(data=st.data())
def test_what_is_written_is_read_back_within_half_a_frame_unit(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    frame, meant = data.draw(said(case))
    text = case.grammar.render(meant, frame)
    read = case.grammar.parse(text, frame)
    assert (read.fault, read.rest, read.thought) == (None, "", meant.thought.strip())
    assert read.prompt.boxes.shape == meant.prompt.boxes.shape
    assert read.prompt.points.shape == meant.prompt.points.shape
    assert in_frame_units(read.prompt.boxes, meant.prompt.boxes, frame) <= 0.5 + 1e-3
    assert in_frame_units(read.prompt.points, meant.prompt.points, frame) <= 0.5 + 1e-3
    assert read.prompt.labels.tolist() == meant.prompt.labels.tolist()
    assert isinstance(case.grammar, Unfolding) == ("steps" in case.grammar.says)
    if isinstance(case.grammar, Unfolding):
        steps = case.grammar.unfold(text, frame)
        assert len(steps) == len(read.prompt.boxes) + len(read.prompt.points)
        for part in ("boxes", "points", "labels"):
            assert getattr(steps[-1][1], part).tolist() == getattr(read.prompt, part).tolist()
    check(case.grammar, text, frame)


@every_grammar
def test_a_coordinate_is_rounded_to_the_nearest_and_not_cut(name: str) -> None:
    case, frame = CASES[name], absolute_pixels(height=101, width=53)
    point = [30.6 / 53, 70.6 / 101]
    count = max(case.points[0], 1)
    boxes = [[0, 0, 1, 1]] if case.boxes[1] else []
    text = case.grammar.render(
        Parsed(prompt=MaskPrompt.of(boxes, [point] * count, [1] * count)), frame
    ).replace(" ", "")
    assert text.count("[31,71") == count


@every_grammar
@pytest.mark.parametrize(
    "box", [[0.2, 0.1, 0.2004, 0.9], [0.1, 0.5, 0.9, 0.5001], [0.9999, 0.9999, 1, 1], [0, 0, 1e-4, 1e-4]]
)
def test_a_box_thinner_than_a_frame_unit_is_still_a_sentence(name: str, box: list[float]) -> None:
    case, frame = CASES[name], absolute_pixels(height=333, width=251)
    count = max(case.points[0], 1)
    prompt = MaskPrompt.of([box] if case.boxes[1] else [], [box[:2]] * count, [1] * count)
    read = case.grammar.parse(case.grammar.render(Parsed(prompt=prompt), frame), frame)
    assert read.fault is None
    assert in_frame_units(read.prompt.boxes, prompt.boxes, frame) <= 1.5


@every_grammar
def test_a_fault_cannot_be_written(name: str) -> None:
    with pytest.raises(ValueError, match="BAD_LABEL"):
        CASES[name].grammar.render(Parsed(fault=ParseFault.BAD_LABEL), permille(1, 1))


@every_grammar
@pytest.mark.parametrize("tag", TAGS[:2])
def test_a_thought_with_a_tag_that_would_end_it_is_not_written(name: str, tag: str) -> None:
    case = CASES[name]
    if "thought" not in case.grammar.says:
        assert tag not in case.grammar.render(Parsed(thought=tag, prompt=spoken(case)), permille(1, 1))
        return
    with pytest.raises(ValueError, match="tag"):
        case.grammar.render(Parsed(thought=f"a {tag} b", prompt=spoken(case)), permille(1, 1))


@every_grammar
def test_an_answer_without_objects_is_written_by_those_grammars_that_can(name: str) -> None:
    case, nothing = CASES[name], Parsed(thought="no fish", prompt=MaskPrompt.of())
    if "nothing" in case.grammar.says:
        text = case.grammar.render(nothing, permille(1, 1))
        assert case.grammar.parse(text, permille(1, 1)).prompt.boxes.shape == (0, 4)
    else:
        with pytest.raises(ValueError, match="must have"):
            case.grammar.render(nothing, permille(1, 1))


@every_grammar
@pytest.mark.parametrize("query", [None, "the left fish", "braces {like} {0} these", "{Question}"])
def test_the_chat_shows_one_image_and_then_asks(name: str, query: str | None) -> None:
    chat = CASES[name].grammar.messages(query)
    assert isinstance(CASES[name].grammar, Grammar)
    assert [part["type"] for message in chat for part in message["content"]].count("image") == 1
    assert (chat[-1]["role"], [part["type"] for part in chat[-1]["content"]]) == ("user", ["image", "text"])
    assert query is None or query.lower() in chat[-1]["content"][1]["text"].lower()


TAGGED = (
    "<think> a fish </think> <bbox>[1,2,3,4]</bbox>, <bbox>[5,6,7,8]</bbox>, "
    "<points>[[1,1],[2,2]]</points>, <labels>[1,0]</labels>"
)


@pytest.mark.parametrize(
    "text",
    [
        TAGGED,
        TAGGED.replace("a fish", "<bbox>[9,9,9,9]</bbox> <labels>[0,0,0]</labels>"),
        TAGGED.replace("</think>", "</think></bbox>"),
        TAGGED.replace("</bbox>, <p", "</bbox></bbox>, <p"),
        TAGGED.replace("<points>", "</labels><points>"),
        TAGGED + "</bbox> and <bbox>",
    ],
)
def test_tags_say_where_each_box_is_complete_and_each_label(text: str) -> None:
    steps = CASES["seg_r1_tags"].grammar.unfold(text, permille(1, 1))
    tails = [text[:end].rstrip()[-9:] for end, _ in steps]
    assert tails == ["4]</bbox>", "8]</bbox>", "abels>[1,", "els>[1,0]"]


@pytest.mark.parametrize("text", [
    TAGGED.replace("</labels>", ""), TAGGED + "<labels>[1]</labels>",
    TAGGED.replace("</bbox>, <p", "</bbox>, <bbox>[9,9,1,1]</bbox><p"),
])  # fmt: skip
def test_what_a_box_was_worth_does_not_hang_on_the_faults_behind_it(text: str) -> None:
    grammar = CASES["seg_r1_tags"].grammar
    assert grammar.parse(text, permille(1, 1)).fault is not None
    assert [len(p.boxes) for _, p in grammar.unfold(text, permille(1, 1))] == [1, 2, 2, 2]


# --- whatever the text: no exception, no doubt, no wait


def spoken(case: Case) -> MaskPrompt:
    """Return the largest mask prompt that a grammar can write."""
    boxes = [[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1], [0.3, 0.3, 0.4, 0.9]][: case.boxes[1]]
    points = [[0.25, 0.5], [0.3, 0.35], [1, 1], [0, 0.125]][: case.points[1]]
    return MaskPrompt.of(boxes, points, [1, int(not case.background), 1, 1][: len(points)])


def check(grammar: Grammar, text: str, frame: Frame) -> ParseFault | None:
    """Read a text, check every clause of the contract about the result, and return the fault.

    Reading may take 10 ms for each 100,000 characters. The best of five readings counts, because the machine
    may be busy.
    """
    allowed = 0.010 * max(1, len(text) / 100_000)
    for attempt in range(5):
        start = time.thread_time()
        parsed = grammar.parse(text, frame)
        spent = time.thread_time() - start
        if spent < allowed:
            break
        assert attempt < 4, f"{spent:.3f} s for {len(text)} characters, {text[:200]!r}"
    shown = f"{text[:1000]!r} with {parsed.fault}"
    if isinstance(grammar, Unfolding):
        check_unfolding(grammar, text, frame)
    assert (parsed.prompt is None) != (parsed.fault is None), shown
    if parsed.prompt is None:
        assert isinstance(parsed.fault, ParseFault), shown
        return parsed.fault
    prompt = parsed.prompt
    assert (prompt.boxes.dtype, prompt.points.dtype) == (np.float32, np.float32), shown
    assert prompt.boxes.shape[1:] == (4,), shown
    assert prompt.points.shape == (len(prompt.labels), 2), shown
    for x1, y1, x2, y2 in prompt.boxes.tolist():  # NaN and infinity fail here, too
        assert 0 <= x1 < x2 <= 1, shown
        assert 0 <= y1 < y2 <= 1, shown
    assert all(0 <= value <= 1 for point in prompt.points.tolist() for value in point), shown
    assert set(prompt.labels.tolist()) <= {0, 1}, shown
    return None


def check_unfolding(grammar: Unfolding, text: str, frame: Frame) -> None:
    """Check that every step depends on the text up to its end alone."""
    for attempt in range(5):
        start = time.thread_time()
        steps = grammar.unfold(text, frame)
        if time.thread_time() - start < 0.05 * max(1, len(text) / 100_000):
            break
        assert attempt < 4, text[:200]
    shown = f"{text[:1000]!r} with {steps}"
    ends = [end for end, _ in steps]
    assert ends == sorted(ends), shown
    for cut in {len(text) // 2, *ends[:3], *(end - 1 for end in ends[:3])}:
        before = grammar.unfold(text[:cut], frame)
        assert [repr(step) for step in before] == [repr(step) for step in steps if step[0] <= cut], shown


NOISE = [
    *TAGS, *"[]{},:.-'\"01 \n\t\\", "]]", "[[", "],[", "null", "true", "False", "NaN", "Infinity",
    "-Infinity", "nan", "inf", "1e999", "-1e999", "1e-999", "1e5", "0x1", "1_0", "-0.0", ".5", "9" * 7,
    "9" * 25, "1" * 300, "1" * 5000, "[" * 50, "[" * 3000, "{" * 50, '{"bbox":' * 200, "<think>" * 40,
    "\ud800", "\udfff\ud800", "\u202e", "\u0665\u0661", "\uff11", "\u00b2", "\U0001f41f\u200d\U0001f41f",
    "\x00", "\r\n", "\ufeff", "\u2028", "```json", "</", "<", ">", '"bbox":', '"points":',
    '"bbox_2d":[1,2,3,4],', '"points_1":[1,2],', "__import__('os')", '"\\ud800"', "<\\think>",
    "</think><answer>[]</answer>",
]  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    """Apply one to three small accidents to a text."""
    for _ in range(1 + int(rng.random() * 3)):
        i = int(rng.random() * (len(text) + 1))
        j = min(len(text), i + 1 + int(rng.random() ** 3 * 60))
        kind = int(rng.random() * 9)
        if kind == 0:
            text = text[:i]
        elif kind == 1:
            text = text[:i] + text[j:]
        elif kind == 2:
            text = text[:j] + text[i:]
        elif kind == 3:
            text = text[i:] + text[:i] if rng.random() < 0.3 else text[i:]
        elif kind == 4:
            text = text[:i] + chr(int(rng.random() * (0x250 if rng.random() < 0.8 else 0x110000))) + text[j:]
        elif kind == 5:  # a tag once more, or somewhere else
            tag = TAGS[int(rng.random() * len(TAGS))]
            text = text.replace(tag, tag * 2, 1) if rng.random() < 0.5 else text[:i] + tag + text[i:]
        elif kind == 6:  # one whole field inside another, or twice
            tag = TAGS[2 * int(rng.random() * 5)][1:-1]
            text = text.replace(f"<{tag}>", f"<{tag}>{text[i:j]}</{tag}><{tag}>", 1)
        else:
            text = text[:i] + NOISE[int(rng.random() * len(NOISE))] + text[i if kind == 7 else j :]
    return text


MONSTERS = {
    "nothing": "",
    "ones": "1" * 100_000,
    "brackets": "[" * 100_000,
    "shut brackets": "]" * 100_000,
    "thoughts": "<think>" * 14_000,
    "ends of thoughts": "</think>" * 12_500,
    "empty thoughts": "<think></think>" * 6_600,
    "empty answers": "<answer></answer>" * 5_800,
    "empty boxes": "<bbox></bbox>" * 7_700,
    "stray ends of boxes": "</bbox>" * 14_000,
    "objects": '{"bbox":' * 12_500,
    "objects just short enough": '{"bbox":' * 2_400,
    "brackets just short enough": "[" * 9_900 + "]" * 9_900,
    "pairs of brackets just short enough": "[],[" * 4_900,
    "digits just short enough": "1" * 4_300 + "." + "1" * 15_000,
    "keys just short enough": "{" + ",".join(f'"{i}":0' for i in range(2_000)) + "}",
    "white space": " \r\n\t" * 25_000,
    "right to left": "\u202e\u05d0" * 50_000,
    "surrogates": "\ud800" * 100_000,
    "zeros": "\x00" * 100_000,
    "quotes": "'\"\\" * 33_000,
    "numbers": "1,2," * 25_000,
}


@every_grammar
@pytest.mark.parametrize("monster", MONSTERS)
def test_a_hundred_kilobytes_of_anything_anywhere_raise_nothing_and_take_no_time(
    name: str, monster: str
) -> None:
    case, frame, much = CASES[name], absolute_pixels(height=333, width=251), MONSTERS[monster]
    good = case.grammar.render(Parsed(thought="a fish", prompt=spoken(case)), frame)
    assert check(case.grammar, good, frame) is None
    places = {0, len(good), *(good.find(mark) + 1 for mark in ("fish", "<answer", "[", ",", "]", ">"))}
    for place in sorted(places):
        check(case.grammar, good[:place] + much + good[place:], frame)
    check(case.grammar, f"<think>{much}</think><answer>{much}</answer>", frame)
    check(case.grammar, much, frame)


@every_grammar
@pytest.mark.parametrize(
    "times", [pytest.param(1_000, id="some"), pytest.param(100_000, id="all", marks=pytest.mark.slow)]
)
def test_accidents_raise_nothing_leave_no_doubt_and_take_no_time(name: str, times: int) -> None:
    """The tests above read back what is written; this one reads it after one to three accidents."""
    case, rng = CASES[name], random.Random(20261121)
    both = [absolute_pixels(height=333, width=251), absolute_pixels(height=1, width=3), permille(7, 9)]
    good = [
        (case.grammar.render(Parsed(thought=thought, prompt=spoken(case)), frame), frame)
        for frame in both
        for thought in ("a fish hides left", "")
    ]
    monsters = list(MONSTERS.values())
    heard: Counter[ParseFault | None] = Counter()
    for number in range(times):
        text, frame = good[number % len(good)]
        text = mutated(text, rng)
        if number % 100 == 0:
            place = int(rng.random() * (len(text) + 1))
            text = text[:place] + monsters[number // 100 % len(monsters)] + text[place:]
        heard[check(case.grammar, text, frame)] += 1
    assert heard[None] > times // 20  # many are still sentences, and all that can go wrong goes wrong
    assert {fault for fault in ParseFault if heard[fault] == 0} >= NEVER[name]
    assert times < 100_000 or {fault for fault in ParseFault if heard[fault] == 0} == NEVER[name]


LISTED = {ParseFault.NO_LABELS, ParseFault.LABEL_COUNT}
THINKING = {ParseFault.NO_THOUGHT, ParseFault.NO_BOX, ParseFault.DEGENERATE_BOX}
IN_JSON = {ParseFault.NO_ANSWER, ParseFault.BAD_JSON}
NEVER: dict[str, set[ParseFault]] = {
    "seg_r1_tags": {ParseFault.BAD_JSON},
    "seg_r1_released": IN_JSON | {ParseFault.NO_THOUGHT, ParseFault.DUPLICATE_FIELD},
    "seg_r1_points": IN_JSON | THINKING,
    "sam_r1_json": LISTED,
    "seg_zero_json": LISTED | {ParseFault.BAD_LABEL},
    "vision_reasoner_json": LISTED | {ParseFault.BAD_LABEL},
}
"""The faults that a grammar has no occasion for."""
