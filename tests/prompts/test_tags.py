from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrl.prompts.frames import absolute_pixels, from_unit, permille
from segrl.prompts.tags import SegR1Points, SegR1Tags
from segrl.types import Frame, MaskPrompt, Parsed, ParseFault

FRAME = absolute_pixels(height=200, width=100)
TAGS = SegR1Tags(max_boxes=3, max_points=4)
POINTS = SegR1Points(max_points=4)

THOUGHT = "<think> a fish hides left </think>"
BOX = "<bbox>[10,20,30,40]</bbox>"
TWO_POINTS = "<points>[[20,30],[90,190]]</points>"
LABELS = "<labels>[1,0]</labels>"
GOOD = f"{THOUGHT} {BOX}, {TWO_POINTS}, {LABELS}"
GOOD_POINTS = f"{TWO_POINTS} {LABELS}"


def close(left: np.ndarray, right: object) -> None:
    np.testing.assert_allclose(left, np.asarray(right), rtol=0, atol=1e-7)


# --- what is read, by hand


def test_a_sentence_is_read_to_unit_coordinates() -> None:
    parsed = TAGS.parse(GOOD, FRAME)
    assert (parsed.fault, parsed.thought) == (None, "a fish hides left")
    close(parsed.prompt.boxes, [[0.1, 0.1, 0.3, 0.2]])
    close(parsed.prompt.points, [[0.2, 0.15], [0.9, 0.95]])
    assert parsed.prompt.labels.tolist() == [1, 0]


def test_a_points_sentence_is_read_to_unit_coordinates_and_has_no_box() -> None:
    parsed = POINTS.parse(GOOD_POINTS, FRAME)
    assert parsed.fault is None
    close(parsed.prompt.points, [[0.2, 0.15], [0.9, 0.95]])
    assert parsed.prompt.labels.tolist() == [1, 0]
    assert parsed.prompt.boxes.shape == (0, 4)


def test_several_boxes_are_read_in_order() -> None:
    text = GOOD.replace(
        BOX, "<bbox>[0,0,50,100]</bbox>, <bbox>[50,100,100,200]</bbox> <bbox>[1,2,3,4]</bbox>"
    )
    close(
        TAGS.parse(text, FRAME).prompt.boxes,
        [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.01, 0.01, 0.03, 0.02]],
    )


def test_leading_zeros_and_fractions_are_numbers() -> None:
    text = GOOD.replace("[10,20,30,40]", "[007,0020,30.5,040.000001]").replace("[20,30]", "[02,00]")
    parsed = TAGS.parse(text, FRAME)
    close(parsed.prompt.boxes, [[0.07, 0.1, 0.305, 0.2]])
    close(parsed.prompt.points[0], [0.02, 0.0])


def test_coordinates_outside_the_image_are_clamped_to_its_border() -> None:
    text = GOOD.replace("[10,20,30,40]", "[-5,-1,150,999999]").replace("[20,30]", "[101,-7]")
    parsed = TAGS.parse(text, FRAME)
    assert parsed.prompt.boxes.tolist() == [[0, 0, 1, 1]]
    assert parsed.prompt.points[0].tolist() == [1, 0]


def test_line_breaks_of_windows_change_nothing() -> None:
    text = GOOD.replace(", ", ",\r\n").replace("[[", "[\r\n [").replace("> ", ">\r\n")
    parsed, plain = TAGS.parse(text, FRAME), TAGS.parse(GOOD, FRAME)
    assert parsed.fault is None
    close(parsed.prompt.boxes, plain.prompt.boxes)
    close(parsed.prompt.points, plain.prompt.points)


def test_fields_inside_the_thought_are_not_the_answer() -> None:
    text = GOOD.replace(
        "a fish", "maybe <bbox>[1,1,9,9]</bbox> <points>[[1,1]]</points> <labels>[0]</labels> a fish"
    )
    parsed = TAGS.parse(text, FRAME)
    close(parsed.prompt.boxes, [[0.1, 0.1, 0.3, 0.2]])
    assert parsed.prompt.labels.tolist() == [1, 0]


def test_fields_inside_the_thought_are_not_the_answer_after_a_stray_closing_tag_either() -> None:
    text = "</think>" + GOOD.replace("a fish", "maybe <bbox>[1,1,9,9]</bbox> a fish")
    parsed = TAGS.parse(text, FRAME)
    assert parsed.fault is not None or len(parsed.prompt.boxes) == 1


def test_fields_before_the_thought_are_not_the_answer() -> None:
    assert TAGS.parse(f"{BOX}, {TWO_POINTS}, {LABELS} {THOUGHT}", FRAME).fault is ParseFault.NO_ANSWER


# --- what is refused


def with_box(numbers: str) -> str:
    return GOOD.replace("[10,20,30,40]", numbers)


def with_points(numbers: str) -> str:
    return GOOD.replace("[[20,30],[90,190]]", numbers)


def with_labels(numbers: str) -> str:
    return GOOD.replace("[1,0]", numbers)


NOT_A_BOX = (
    "[10,20,30]", "[10,20,30,40,50]", "10,20,30,40", "", "[nan,20,30,40]", "[10,20,inf,40]", "[1e1,20,30,40]",
    "[0x1,20,30,40]", "[1_0,20,30,40]", "[10,20,30,40] [1,2,3,4]", "__import__('os').system('true')",
)  # fmt: skip
NOT_POINTS = ("[]", "[[]]", "[20,30]", "[[20,30,1],[90,190]]", "[[20,30][90,190]]", "[[20,30],[90,190]")
ARABIC_ONE = "\u0661"
NOT_A_LABEL = (
    "[1,2]",
    "[3,0]",
    "[-1,0]",
    "[01,0]",
    "[1,0.5]",
    "[1.,0]",
    "[1,]",
    "[]",
    "[True,False]",
    f"[{ARABIC_ONE},0]",
)
OUTSIDE = ("[100,20,300,40]", "[-9,-9,0,0]")
NO_AREA = ("[10,20,10,40]", "[30,20,10,40]", "[10,40,30,20]", *OUTSIDE)
TAG_FAULTS: dict[ParseFault, list[str]] = {
    ParseFault.NO_THOUGHT: ["", GOOD.replace("<think>", ""), GOOD.replace("</think>", "")],
    ParseFault.NO_ANSWER: [THOUGHT, THOUGHT + " \n"],
    ParseFault.NO_BOX: [GOOD.replace(*pair) for pair in ((BOX, ""), ("</bbox>", "<bbox>"), ("bbox", "box"))],
    ParseFault.NO_POINTS: [GOOD.replace(TWO_POINTS, ""), GOOD.replace("</points>", "")],
    ParseFault.NO_LABELS: [GOOD.replace(LABELS, ""), GOOD.replace("</labels>", "")],
    ParseFault.DUPLICATE_FIELD: [THOUGHT + GOOD, GOOD + TWO_POINTS, GOOD + LABELS],
    ParseFault.BAD_NUMBERS: [*map(with_box, NOT_A_BOX), *map(with_points, NOT_POINTS), with_labels("1,0")],
    ParseFault.BAD_LABEL: [*map(with_labels, NOT_A_LABEL)],
    ParseFault.LABEL_COUNT: [with_labels("[1]"), with_labels("[1,0,1]")],
    ParseFault.DEGENERATE_BOX: [*map(with_box, NO_AREA), GOOD.replace(BOX, f"{BOX} <bbox>[5,5,5,9]</bbox>")],
    ParseFault.TOO_MANY: [GOOD.replace(BOX, BOX * 4), GOOD.replace("[[", "[[1,1],[2,2],[3,3],[")],
}


@pytest.mark.parametrize(
    ("fault", "text"), [(fault, text) for fault, texts in TAG_FAULTS.items() for text in texts]
)
def test_each_fault_is_named(fault: ParseFault, text: str) -> None:
    parsed = TAGS.parse(text, FRAME)
    assert (parsed.fault, parsed.prompt) == (fault, None)


def test_every_kind_of_fault_has_a_text_above() -> None:
    assert set(TAG_FAULTS) == set(ParseFault) - {ParseFault.BAD_JSON}


def test_a_label_may_have_a_fraction_of_nothing_as_coordinates_may() -> None:
    text = GOOD.replace("[1,0]", "[1.0, 0.000]")
    parsed = TAGS.parse(text, FRAME)
    assert (parsed.fault, parsed.prompt.labels.tolist()) == (None, [1, 0])
    assert [len(step.points) for _, step in TAGS.unfold(text, FRAME)] == [0, 1, 2]
    assert POINTS.parse(GOOD_POINTS.replace("[1,0]", "[1.0,0.0]"), FRAME).prompt.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("behind", "rest"), [("", ""), (".", ""), (" .\n", ""), ("..", ".."), (". And so on", ". And so on")]
)
def test_a_full_stop_ends_the_sentence_and_more_is_rambling(behind: str, rest: str) -> None:
    assert TAGS.parse(GOOD + behind, FRAME).rest == POINTS.parse(GOOD_POINTS + behind, FRAME).rest == rest


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (GOOD.replace("[1,0]", "[2,0]") + " and so on", "and so on"),
        (GOOD.replace("[1,0]", "[2,0]"), ""),
        (THOUGHT + " a fish at the left", "a fish at the left"),
        (THOUGHT + " <bbox>[10,20", "<bbox>[10,20"),
    ],
)
def test_what_stands_behind_a_faulty_answer_is_kept_too(text: str, rest: str) -> None:
    parsed = TAGS.parse(text, FRAME)
    assert (parsed.prompt, parsed.rest) == (None, rest)


def test_words_in_front_of_the_thought_are_legal_as_in_the_released_code() -> None:
    parsed = TAGS.parse("well, " + GOOD, FRAME)
    assert (parsed.fault, parsed.rest) == (None, "")


def test_a_fault_after_the_thought_keeps_the_thought() -> None:
    assert TAGS.parse(GOOD.replace("[1,0]", "[2,0]"), FRAME).thought == "a fish hides left"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (ParseFault.NO_POINTS, LABELS),
        (ParseFault.NO_LABELS, TWO_POINTS),
        (ParseFault.DUPLICATE_FIELD, GOOD_POINTS + LABELS),
        (ParseFault.DUPLICATE_FIELD, TWO_POINTS + GOOD_POINTS),
        (ParseFault.BAD_NUMBERS, GOOD_POINTS.replace("20,30", "20;30")),
        (ParseFault.BAD_LABEL, GOOD_POINTS.replace("[1,0]", "[1,2]")),
        (ParseFault.LABEL_COUNT, GOOD_POINTS.replace("[1,0]", "[1]")),
        (ParseFault.TOO_MANY, GOOD_POINTS.replace("[[", "[[1,1],[2,2],[3,3],[")),
    ],
)
def test_each_fault_of_a_points_sentence_is_named(fault: ParseFault, text: str) -> None:
    assert POINTS.parse(text, FRAME) == Parsed(fault=fault)


def test_exactly_as_many_boxes_and_points_as_allowed_are_no_fault() -> None:
    text = GOOD.replace(BOX, BOX * 3).replace("[[", "[[1,1],[2,2],[").replace("[1,0]", "[1,1,1,0]")
    parsed = TAGS.parse(text, FRAME)
    assert parsed.fault is None
    assert (len(parsed.prompt.boxes), len(parsed.prompt.points)) == (3, 4)


# --- render and parse are inverse


Said = tuple[Frame, Parsed, list[list[int]]]


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    if draw(st.booleans()):
        return permille(draw(st.integers(1, 4000)), draw(st.integers(1, 4000)))
    return absolute_pixels(draw(st.integers(28, 1036)), draw(st.integers(28, 1036)))


@st.composite
def coordinates(draw: st.DrawFn, whole: int, extent: float) -> float:
    """Draw a unit coordinate whose nearest integer of the frame is `whole`."""
    return min(max((whole + draw(st.floats(-0.49, 0.49))) / extent, 0.0), 1.0)


@st.composite
def sentences(draw: st.DrawFn) -> Said:
    """Draw a frame, a mask prompt, and the whole numbers that write its boxes."""
    frame = draw(frames())
    boxes, wholes = [], []
    for _ in range(draw(st.integers(1, 3))):
        sides = []
        for extent in (int(frame.width), int(frame.height)):
            low = draw(st.integers(0, extent - 1))
            sides.append((low, draw(st.integers(low + 1, extent))))
        wholes.append([sides[0][0], sides[1][0], sides[0][1], sides[1][1]])
        extents = (frame.width, frame.height) * 2
        boxes.append([draw(coordinates(w, e)) for w, e in zip(wholes[-1], extents, strict=True)])
    points = draw(
        st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=4)
    )
    labels = draw(st.lists(st.integers(0, 1), min_size=len(points), max_size=len(points)))
    thought = draw(st.text(max_size=40).filter(lambda t: "think>" not in t))
    return frame, Parsed(thought=thought, prompt=MaskPrompt.of(boxes, points, labels)), wholes


@given(sentences())
def test_a_rendered_sentence_is_read_back_within_half_a_frame_unit(said: Said) -> None:
    frame, parsed, wholes = said
    read = TAGS.parse(TAGS.render(parsed, frame), frame)
    assert read.fault is None
    assert read.thought == parsed.thought.strip()
    assert from_unit(read.prompt.boxes, frame).tolist() == wholes
    extent = np.array([frame.width, frame.height])
    for got, meant in ((read.prompt.boxes, parsed.prompt.boxes), (read.prompt.points, parsed.prompt.points)):
        error = np.abs(got.astype(np.float64) - meant) * np.resize(extent, meant.shape[1])
        assert error.max() <= 0.5 + 1e-3
    assert read.prompt.labels.tolist() == parsed.prompt.labels.tolist()


@given(sentences())
def test_rendered_points_are_read_back_within_half_a_frame_unit(said: Said) -> None:
    frame, parsed, _ = said
    read = POINTS.parse(POINTS.render(parsed, frame), frame)
    assert read.fault is None
    error = np.abs(read.prompt.points.astype(np.float64) - parsed.prompt.points) * [frame.width, frame.height]
    assert error.max() <= 0.5 + 1e-3
    assert read.prompt.labels.tolist() == parsed.prompt.labels.tolist()
    assert len(read.prompt.boxes) == 0


def test_the_sentence_is_written_as_seg_r1_writes_it() -> None:
    prompt = MaskPrompt.of([[0, 0, 0.5, 1], [0.1, 0.1, 0.3, 0.2]], [[0.25, 0.5], [1, 1]], [1, 0])
    said = Parsed(thought="two fish", prompt=prompt)
    points = "<points>[[25,100],[100,200]]</points>"
    assert TAGS.render(said, FRAME) == (
        "<think> two fish </think> <bbox>[0,0,50,200]</bbox>, <bbox>[10,20,30,40]</bbox>, "
        f"{points}, <labels>[1,0]</labels>"
    )
    assert POINTS.render(said, FRAME) == f"{points} <labels>[1,0]</labels>"


@pytest.mark.parametrize(
    "box", [[0.2, 0.1, 0.204, 0.9], [0.1, 0.5, 0.9, 0.501], [0.999, 0.999, 1, 1], [0, 0, 0.001, 0.001]]
)
def test_a_box_narrower_than_a_frame_unit_is_still_a_sentence_of_the_grammar(box: list[float]) -> None:
    said = Parsed(prompt=MaskPrompt.of([box], [box[:2]], [1]))
    assert TAGS.parse(TAGS.render(said, FRAME), FRAME).fault is None


@pytest.mark.parametrize("grammar", [TAGS, POINTS])
def test_a_fault_cannot_be_written(grammar: SegR1Tags | SegR1Points) -> None:
    with pytest.raises(ValueError, match="NO_BOX"):
        grammar.render(Parsed(fault=ParseFault.NO_BOX), FRAME)


# --- whatever the text


HOSTILE: dict[str, str] = {
    "ones as a label": GOOD.replace("[1,0]", "[" + "1" * 100_000 + "]"),
    "ones as labels without brackets": GOOD.replace("[1,0]", "1" * 100_000),
    "many labels": GOOD.replace("[1,0]", "[" + "1," * 50_000 + "1]"),
    "unterminated label": GOOD.split("</labels>")[0] + "1" * 100_000,
    "ones as a coordinate": GOOD.replace("[10,", "[" + "1" * 100_000 + ","),
    "ones as a fraction": GOOD.replace("[10,", "[1." + "1" * 100_000 + ","),
    "ones as a point": GOOD.replace("[[20,", "[[" + "1" * 100_000 + ","),
    "minus signs": GOOD.replace("[10,", "[" + "-" * 100_000 + "1,"),
    "many points": GOOD.replace("[[", "[[" + "1,1],[" * 16_000),
    "open brackets": GOOD.replace("[[", "[" * 100_000),
    "shut brackets": GOOD.replace("]]", "]" * 100_000),
    "white space": GOOD.replace("[[", "[" + " \t\r\n" * 25_000 + "["),
    "unterminated thought": "<think>" * 15_000,
    "nested thoughts": "<think>" * 10_000 + "</think>" * 10_000,
    "nested boxes": THOUGHT + "<bbox>" * 10_000 + "[1,2,3,4]" + "</bbox>" * 10_000,
    "nested points": THOUGHT + BOX + "<points>" * 10_000 + "</points>" * 10_000 + LABELS,
    "boxes never closed": THOUGHT + "<bbox>[1,2,3,4]" * 10_000,
    "boxes never opened": THOUGHT + "[1,2,3,4]</bbox>" * 10_000,
    "many boxes": GOOD.replace(BOX, BOX * 5_000),
    "not numbers": GOOD.replace("10,20", "NaN,-inf"),
    "digits of another script": GOOD.replace("10,", "\u0661\u0660,"),
    "superscript digits": GOOD.replace("10,", "\u00b2\u00b3,"),
    "fullwidth digits": GOOD.replace("10,", "\uff11\uff10,"),
    "huge integers": GOOD.replace("10,", "9" * 5_000 + ","),
    "code": GOOD.replace("[10,20,30,40]", "__import__('os').getcwd()"),
    "a null byte": GOOD.replace("10,", "1\x000,"),
    "a lone surrogate": GOOD.replace("fish", "\ud800"),
    "every tag inside every other": "<think><bbox><points><labels></think></bbox></points></labels>" * 1_500,
}
REFUSED = set(HOSTILE) - {"digits of another script", "fullwidth digits", "a lone surrogate", "white space"}


def seconds(parse: Callable[[str, Frame], Parsed], text: str, times: int = 3) -> float:
    """Return the CPU seconds of one parse: the best of several, because the machine may be busy."""
    spent = []
    for _ in range(times):
        start = time.thread_time()
        parse(text, FRAME)
        spent.append(time.thread_time() - start)
    return min(spent)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("grammar", [TAGS, POINTS])
def test_a_hostile_text_raises_nothing_and_takes_no_time(grammar: SegR1Tags | SegR1Points, name: str) -> None:
    parsed = grammar.parse(HOSTILE[name], FRAME)
    assert (parsed.prompt is None) != (parsed.fault is None)
    assert seconds(grammar.parse, HOSTILE[name]) < 0.05


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_hostile_text_is_a_fault(name: str) -> None:
    assert TAGS.parse(HOSTILE[name], FRAME).fault is not None


ROOMY = SegR1Tags(max_boxes=10**9, max_points=10**9)
GROWING: dict[str, Callable[[int], str]] = {
    "unterminated digits": lambda n: GOOD.split("</labels>")[0] + "1" * (20 * n),
    "digits": lambda n: GOOD.replace("[1,0]", "[" + "1" * (20 * n) + "]"),
    "fractions": lambda n: GOOD.replace("[10,", "[1." + "1" * (20 * n) + ","),
    "labels": lambda n: GOOD.replace("[1,0]", "[" + "1," * (5 * n) + "1]"),
    "points": lambda n: GOOD.replace("[[", "[[" + "1,1],[" * n),
    "boxes": lambda n: GOOD.replace(BOX, BOX * (n // 4)),
    "open thoughts": lambda n: "<think>" * (5 * n) + "</think>" + GOOD,
    "nested thoughts": lambda n: "<think>" * (5 * n) + "</think>" * (5 * n),
    "white space": lambda n: GOOD.replace("[[", "[" + " \n" * (10 * n) + "["),
}


@pytest.mark.parametrize("name", GROWING)
def test_time_grows_with_the_length_of_the_text(name: str) -> None:
    size = 5_000
    short, long = (seconds(ROOMY.parse, GROWING[name](n), times=5) for n in (size, 8 * size))
    assert long < 30 * short + 0.010  # linear: 8 times, quadratic: 64; the clock's grain is on top


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<bbox>", "</bbox>", "<points>", "</points>", "<labels>", "</labels>", THOUGHT,
     BOX, TWO_POINTS, LABELS, "[[", "]]", "[", "]", "],[", ",", "1", "0", "-", ".", "10,20", "1,2,3,4",
     "999999", " ", "\r\n", "\u0661", "NaN"]
)  # fmt: skip


@given(st.lists(FRAGMENTS | st.text(max_size=3), max_size=40).map("".join))
def test_whatever_is_read_is_either_a_fault_or_a_sound_mask_prompt(text: str) -> None:
    for grammar in (TAGS, POINTS):
        for candidate in (text, GOOD + text, text + GOOD, GOOD_POINTS.replace("[20,30]", text)):
            parsed = grammar.parse(candidate, FRAME)
            assert (parsed.prompt is None) != (parsed.fault is None)
            if parsed.prompt is not None:
                boxes, points, labels = parsed.prompt.boxes, parsed.prompt.points, parsed.prompt.labels
                assert len(boxes) <= 3
                assert 1 <= len(points) == len(labels) <= 4
                assert set(labels.tolist()) <= {0, 1}
                assert ((boxes >= 0) & (boxes <= 1)).all()
                assert ((points >= 0) & (points <= 1)).all()
                assert (boxes[:, 2:] > boxes[:, :2]).all()


# --- the question


@pytest.mark.parametrize("grammar", [TAGS, POINTS])
@pytest.mark.parametrize("query", [None, "the left fish", "braces {like} {0} these"])
def test_the_question_shows_one_image_before_the_text(
    grammar: SegR1Tags | SegR1Points, query: str | None
) -> None:
    user = grammar.messages(query)[-1]
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert query is None or query in user["content"][1]["text"]


def test_the_questions_own_example_of_the_format_is_the_grammars() -> None:
    asked = TAGS.messages(None)[-1]["content"][1]["text"].replace(",...]", "]")
    filled = asked.replace("x1,y1,x2,y2", "10,20,30,40").replace("x3,y3", "1,2").replace("x4,y4", "3,4")
    assert TAGS.parse(filled, FRAME).fault is None
    asked = POINTS.messages(None)[-1]["content"][1]["text"].replace(",...]", "]")
    assert POINTS.parse(asked.replace("x1,y1", "1,2").replace("x2,y2", "3,4"), FRAME).fault is None


@pytest.mark.parametrize("behind", ["", " ", "\n"])
def test_nothing_is_left_behind_a_clean_answer(behind: str) -> None:
    assert TAGS.parse(GOOD + behind, FRAME).rest == "" == POINTS.parse(GOOD_POINTS + behind, FRAME).rest


def test_what_is_said_behind_the_answer_is_kept_and_spoils_nothing() -> None:
    for parsed in (TAGS.parse(f"{GOOD}531,1000 ", FRAME), POINTS.parse(f"{GOOD_POINTS} 531,1000", FRAME)):
        assert (parsed.fault, parsed.rest) == (None, "531,1000")


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        (Parsed(prompt=MaskPrompt.of([], [[0.5, 0.5]], [1])), "1 to 3 boxes"),
        (Parsed(prompt=MaskPrompt.of([[0, 0, 1, 1]] * 4, [[0.5, 0.5]], [1])), "1 to 3 boxes"),
        (Parsed(prompt=MaskPrompt.of([[0, 0, 1, 1]])), "1 to 4 points"),
        (Parsed(prompt=MaskPrompt.of([[0, 0, 1, 1]], [[0.5, 0.5]] * 5, [1] * 5)), "1 to 4 points"),
        (Parsed(thought="a </think> b", prompt=MaskPrompt.of([[0, 0, 1, 1]], [[0.5, 0.5]], [1])), "think"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(said: Parsed, needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        TAGS.render(said, FRAME)
