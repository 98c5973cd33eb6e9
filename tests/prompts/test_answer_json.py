from __future__ import annotations

import json

import numpy as np
import pytest

from segrl.prompts.answer_json import SamR1Json, SegZeroJson, VisionReasonerJson
from segrl.prompts.frames import absolute_pixels, permille
from segrl.prompts.released import SegR1Released
from segrl.prompts.tags import SegR1Points, SegR1Tags
from segrl.protocols import Grammar
from segrl.types import MaskPrompt, Parsed, ParseFault

SAM_R1, SEG_ZERO, REASONER = SamR1Json(max_points=3), SegZeroJson(), VisionReasonerJson(max_boxes=2)
FRAME = absolute_pixels(height=200, width=100)
THOUGHT = "<think> a fish hides left </think>"


def answered(payload: str, thought: str = THOUGHT) -> str:
    return f"{thought}<answer>{payload}</answer>"


SAM_R1_PAYLOAD = '{"bbox":[10,20,30,40],"points":[[20,30,1],[90,190,0]]}'
SEG_ZERO_PAYLOAD = "{'bbox': [10,20,30,40], 'points_1': [20,30], 'points_2': [25,35]}"
REASONER_PAYLOAD = (
    '[{"bbox_2d": [10,20,30,40], "point_2d": [20,30]}, {"bbox_2d": [50,100,100,200], "point_2d": [75,150]}]'
)
EVERY = [(SAM_R1, SAM_R1_PAYLOAD), (SEG_ZERO, SEG_ZERO_PAYLOAD), (REASONER, REASONER_PAYLOAD)]
IDS = ["sam_r1", "seg_zero", "vision_reasoner"]
every_grammar = pytest.mark.parametrize(("grammar", "payload"), EVERY, ids=IDS)


def close(left: np.ndarray, right: object) -> None:
    np.testing.assert_allclose(left, np.asarray(right), rtol=0, atol=1e-7)


# --- what is read, by hand


@pytest.mark.parametrize(
    "between", [" To generate the mask of the target object, ", "", "\n", " <answer is> [1] "]
)
@pytest.mark.parametrize(
    ("payload", "box", "points"),
    [
        (
            '{"bbox":[248,218,395,300],"points":[[360,237,1],[268,262,1]]}',
            [248, 218, 395, 300],
            [[360, 237], [268, 262]],
        ),
        ('{"bbox":[280,24,440,310],"points":[[320,110,1]]}', [280, 24, 440, 310], [[320, 110]]),
    ],
)
def test_sam_r1s_printed_answers_are_read_with_and_without_words_before_them(
    payload: str, box: list[int], points: list[list[int]], between: str
) -> None:
    text = f"<think> the left one </think>{between}<answer>{payload}</answer>"
    parsed = SAM_R1.parse(text, absolute_pixels(840, 840))
    assert (parsed.fault, parsed.thought, parsed.rest) == (None, "the left one", "")
    close(parsed.prompt.boxes, np.array([box]) / 840)
    close(parsed.prompt.points, np.array(points) / 840)
    assert parsed.prompt.labels.tolist() == [1] * len(points)


@pytest.mark.parametrize("quotes", ["'", '"'])
def test_seg_zeros_answer_is_read_in_either_quotes(quotes: str) -> None:
    parsed = SEG_ZERO.parse(answered(SEG_ZERO_PAYLOAD.replace("'", quotes)), FRAME)
    close(parsed.prompt.boxes, [[0.1, 0.1, 0.3, 0.2]])
    close(parsed.prompt.points, [[0.2, 0.15], [0.25, 0.175]])
    assert parsed.prompt.labels.tolist() == [1, 1]


def test_several_objects_are_read_in_the_order_written() -> None:
    parsed = REASONER.parse(answered(REASONER_PAYLOAD), FRAME)
    close(parsed.prompt.boxes, [[0.1, 0.1, 0.3, 0.2], [0.5, 0.5, 1, 1]])
    close(parsed.prompt.points, [[0.2, 0.15], [0.75, 0.75]])
    assert parsed.prompt.labels.tolist() == [1, 1]


@pytest.mark.parametrize("nothing", ["[]", " [ ]\n"])
def test_an_empty_list_says_that_there_is_no_object(nothing: str) -> None:
    parsed = REASONER.parse(answered(nothing), FRAME)
    assert parsed.fault is None
    assert (parsed.prompt.boxes.shape, parsed.prompt.points.shape) == ((0, 4), (0, 2))


@pytest.mark.parametrize(
    ("grammar", "forward", "reversed_"),
    [
        (SAM_R1, SAM_R1_PAYLOAD, '{"points":[[20,30,1],[90,190,0]],"bbox":[10,20,30,40]}'),
        (SEG_ZERO, SEG_ZERO_PAYLOAD, "{'points_2': [25,35], 'points_1': [20,30], 'bbox': [10,20,30,40]}"),
        (
            REASONER,
            REASONER_PAYLOAD,
            '[{"point_2d":[20,30],"bbox_2d":[10,20,30,40]},{"point_2d":[75,150],"bbox_2d":[50,100,100,200]}]',
        ),
    ],
    ids=IDS,
)
def test_the_order_of_the_keys_is_free_and_more_keys_spoil_nothing(
    grammar: Grammar, forward: str, reversed_: str
) -> None:
    more = reversed_.replace("}", ", 'note': 'big'}" if "'" in reversed_ else ', "note": "big"}')
    meant = grammar.parse(answered(forward), FRAME).prompt
    for payload in (reversed_, more):
        read = grammar.parse(answered(payload), FRAME).prompt
        assert (read.boxes.tolist(), read.points.tolist()) == (meant.boxes.tolist(), meant.points.tolist())
        assert read.labels.tolist() == meant.labels.tolist()


@every_grammar
def test_coordinates_outside_the_image_are_clamped_to_its_border(grammar: Grammar, payload: str) -> None:
    text = answered(payload.replace("[10,20,30,40]", "[-5,-1e3,150,999999]").replace("[20,30", "[101.5,-7"))
    parsed = grammar.parse(text, FRAME)
    assert parsed.fault is None
    assert parsed.prompt.boxes[0].tolist() == [0, 0, 1, 1]
    assert parsed.prompt.points[0].tolist() == [1, 0]


@every_grammar
def test_fractions_are_numbers_and_permille_runs_to_a_thousand(grammar: Grammar, payload: str) -> None:
    text = answered(payload.replace("[10,20,30,40]", "[1e1,20.5,250,1000.0]"))
    close(grammar.parse(text, permille(7, 9)).prompt.boxes[0], [0.01, 0.0205, 0.25, 1])


@pytest.mark.parametrize(("written", "read"), [("1.0", 1), ("0.0", 0), ("-0", 0), ("1", 1), ("1e0", 1)])
def test_a_label_may_be_written_as_any_one_or_zero(written: str, read: int) -> None:
    parsed = SAM_R1.parse(answered(SAM_R1_PAYLOAD.replace("190,0]", f"190,{written}]")), FRAME)
    assert parsed.prompt.labels.tolist() == [1, read]
    assert parsed.prompt.labels.dtype == np.int64


@every_grammar
def test_answers_inside_the_thought_or_before_it_are_not_the_answer(grammar: Grammar, payload: str) -> None:
    other = payload.replace("10,20,30,40", "1,1,9,9")
    inside = answered(payload, f"<think> maybe <answer>{other}</answer> or not </think>")
    before = f"<answer>{other}</answer>" + answered(payload)
    for text in (inside, before):
        close(grammar.parse(text, FRAME).prompt.boxes[0], [0.1, 0.1, 0.3, 0.2])


@every_grammar
@pytest.mark.parametrize(
    ("behind", "kept"), [("", ""), (" \n", ""), (" 531,1000 ", "531,1000"), ("<a", "<a")]
)
def test_what_stands_behind_the_answer_is_kept_and_spoils_nothing(
    grammar: Grammar, payload: str, behind: str, kept: str
) -> None:
    parsed = grammar.parse(answered(payload) + behind, FRAME)
    assert (parsed.fault, parsed.rest) == (None, kept)


def test_exactly_as_many_points_and_objects_as_allowed_are_no_fault() -> None:
    three = SAM_R1_PAYLOAD.replace("[20,", "[1,1,1],[20,")
    assert len(SAM_R1.parse(answered(three), FRAME).prompt.points) == 3
    assert len(REASONER.parse(answered(REASONER_PAYLOAD), FRAME).prompt.boxes) == 2


# --- what is refused


NO_JSON = ("0x10", "010", "+10", "1_0", "NaN", "-Infinity", "__import__('os').getpid()")
NO_OBJECT = ("", "null", "7", '"bbox points points_1 points_2"', "[" * 9_000 + "]" * 9_000)
NO_COORDINATE = ("true,", "null,", "[10],", "", "10,10,", "1e999,", "-1000001,", "9" * 4_000 + ",")
NO_AREA = ("10,20,10,40", "10,40,30,20", "100,20,300,40", "-9,-9,0,0")
OBJECT = '{"bbox_2d":[1,2,3,4],"point_2d":[1,2]}'


def outer_faults(good: str, payload: str) -> list[tuple[ParseFault, str]]:
    """Return texts that every JSON grammar refuses around a payload."""
    return [
        (ParseFault.NO_THOUGHT, ""),
        (ParseFault.NO_THOUGHT, good.replace("<think>", "")),
        (ParseFault.NO_THOUGHT, good.replace("</think>", r"<\think>")),
        (ParseFault.NO_ANSWER, THOUGHT),
        (ParseFault.NO_ANSWER, THOUGHT + payload),
        (ParseFault.NO_ANSWER, good.replace("</answer>", "")),
        (ParseFault.NO_ANSWER, f"<answer>{payload}</answer>{THOUGHT}"),
        (ParseFault.DUPLICATE_FIELD, THOUGHT + good),
        (ParseFault.DUPLICATE_FIELD, good + THOUGHT),
        (ParseFault.DUPLICATE_FIELD, f"{good}<answer>{payload}</answer>"),
        (ParseFault.TOO_MANY, answered(" " * 20_000 + payload)),
        (ParseFault.BAD_JSON, answered(payload.replace(":", "=", 1))),
        (ParseFault.BAD_JSON, answered(payload + ",")),
        (ParseFault.BAD_JSON, answered(payload.replace("[20,30", "[NaN,30"))),
        *((ParseFault.BAD_JSON, answered(payload.replace("10,", f"{number},"))) for number in NO_JSON),
        *((ParseFault.BAD_JSON, answered(other)) for other in NO_OBJECT),
        *((ParseFault.BAD_NUMBERS, answered(payload.replace("10,", number))) for number in NO_COORDINATE),
        (ParseFault.BAD_NUMBERS, answered(payload.replace("[10,20,30,40]", "7"))),
        (ParseFault.BAD_NUMBERS, answered(payload.replace("[20,30", "[false,30"))),
        (ParseFault.BAD_NUMBERS, answered(payload.replace("[20,30", "[20,30,1,1"))),
        *((ParseFault.DEGENERATE_BOX, answered(payload.replace("10,20,30,40", box))) for box in NO_AREA),
        (ParseFault.NO_BOX, answered(payload.replace("bbox", "box"))),
        (ParseFault.NO_POINTS, answered(payload.replace("point", "dot"))),
    ]


def inner_faults() -> dict[str, list[tuple[ParseFault, str]]]:
    """Return texts that one grammar alone refuses."""
    labelled = SAM_R1_PAYLOAD.replace
    return {
        "sam_r1": [
            (ParseFault.BAD_JSON, "[]"),
            (ParseFault.BAD_JSON, f"[{SAM_R1_PAYLOAD},{SAM_R1_PAYLOAD}]"),
            (ParseFault.BAD_JSON, f"[[{SAM_R1_PAYLOAD}]]"),
            (ParseFault.BAD_JSON, f"```json {SAM_R1_PAYLOAD}"),
            (ParseFault.BAD_JSON, f"here: ```json {SAM_R1_PAYLOAD}```"),
            (ParseFault.BAD_JSON, labelled("]]", "],]")),
            (ParseFault.BAD_JSON, labelled("[20,30,1]", "(20,30,1)")),
            (ParseFault.NO_POINTS, '{"bbox":[1,2,3,4],"points":[]}'),
            (ParseFault.NO_POINTS, '{"bbox":[1,2,3,4],"points":{"x":1}}'),
            (ParseFault.BAD_NUMBERS, labelled("[20,30,1]", "[20,30]")),
            (ParseFault.BAD_NUMBERS, '{"bbox":[1,2,3,4],"points":[30,40,1]}'),
            (ParseFault.BAD_NUMBERS, labelled("[20,30,1]", "[20,30,true]")),
            (ParseFault.BAD_NUMBERS, labelled("[20,30,1]", '[20,30,"1"]')),
            (ParseFault.BAD_LABEL, labelled("[20,30,1]", "[20,30,2]")),
            (ParseFault.BAD_LABEL, labelled("[20,30,1]", "[20,30,-1]")),
            (ParseFault.BAD_LABEL, labelled("[20,30,1]", "[20,30,0.5]")),
            (ParseFault.TOO_MANY, labelled("[20,30,1]", "[1,1,1],[2,2,1],[3,3,1]")),
        ],
        "seg_zero": [
            (ParseFault.BAD_JSON, "[]"),
            (ParseFault.BAD_JSON, SEG_ZERO_PAYLOAD.replace("'bbox'", "'bbox\"")),
            (ParseFault.BAD_JSON, SEG_ZERO_PAYLOAD.replace("}", ", 'note': 'the dog's'}")),
            (ParseFault.NO_POINTS, SEG_ZERO_PAYLOAD.replace("points_2", "points_3")),
            (ParseFault.BAD_NUMBERS, SEG_ZERO_PAYLOAD.replace("[25,35]", "[]")),
        ],
        "vision_reasoner": [
            (ParseFault.NO_BOX, '{"objects":[]}'),
            (ParseFault.BAD_JSON, "[[]]"),
            (ParseFault.NO_BOX, "[{}]"),
            (ParseFault.NO_BOX, f'[{OBJECT},{{"point_2d":[1,2]}}]'),
            (ParseFault.NO_POINTS, f'[{OBJECT},{{"bbox_2d":[1,2,3,4]}}]'),
            (ParseFault.DEGENERATE_BOX, f"[{OBJECT},{OBJECT.replace('1,2,3,4', '3,2,3,4')}]"),
            (ParseFault.TOO_MANY, f"[{OBJECT},{OBJECT},{OBJECT}]"),
        ],
    }


FAULTS = [
    (grammar, fault, text)
    for (grammar, payload), name in zip(EVERY, IDS, strict=True)
    for fault, text in [
        *outer_faults(answered(payload), payload),
        *((fault, answered(inner)) for fault, inner in inner_faults()[name]),
    ]
]


@pytest.mark.parametrize(("grammar", "fault", "text"), FAULTS)
def test_each_fault_is_named(grammar: Grammar, fault: ParseFault, text: str) -> None:
    parsed = grammar.parse(text, FRAME)
    assert (parsed.fault, parsed.prompt) == (fault, None)


def test_every_kind_of_fault_that_json_has_is_above() -> None:
    of_lists = {ParseFault.NO_LABELS, ParseFault.LABEL_COUNT}
    assert {fault for grammar, fault, _ in FAULTS if grammar is SAM_R1} == set(ParseFault) - of_lists


@every_grammar
def test_a_fault_after_the_thought_keeps_the_thought(grammar: Grammar, payload: str) -> None:
    assert grammar.parse(answered(payload.replace("bbox", "box")), FRAME).thought == "a fish hides left"


@every_grammar
def test_words_around_a_faulty_answer_are_kept_too(grammar: Grammar, payload: str) -> None:
    parsed = grammar.parse("oh " + answered(payload.replace("bbox", "box")) + " and so on", FRAME)
    assert (parsed.fault, parsed.rest) == (ParseFault.NO_BOX, "oh and so on")
    assert grammar.parse("oh " + answered(payload), FRAME).rest == "oh"


def test_partly_is_the_share_of_boxes_and_points_of_the_right_length() -> None:
    half, words = '{"bbox_2d":[1,2,3,4]}', '{"bbox_2d":["a","b","c","d"],"point_2d":[1,2]}'
    for payload, share in (
        (f"[{OBJECT},{half}]", 0.75),
        (f"[{half}]", 0.5),
        (f"[{words}]", 1.0),
        (f"[{OBJECT},{OBJECT},{OBJECT}]", 1.0),
        ('[{"bbox_2d":[1,2,3],"point_2d":{}}]', 0.0),
        ("[7]", 0.0),
        ("7", 0.0),
        (f"```json [{half}]```", 0.0),
    ):
        parsed = REASONER.parse(answered(payload), FRAME)
        assert parsed.fault is not None and parsed.partly == share, payload


# --- what base models write


LOOSE: list[tuple[Grammar, str, bool]] = [
    (SAM_R1, SAM_R1_PAYLOAD, False),
    (SAM_R1, f"```json\n{SAM_R1_PAYLOAD}\n```", True),
    (SAM_R1, f" ```JSON{SAM_R1_PAYLOAD}``` ", True),
    (SAM_R1, f"```{SAM_R1_PAYLOAD}```", True),
    (SAM_R1, f"[{SAM_R1_PAYLOAD}]", True),
    (SAM_R1, SAM_R1_PAYLOAD.replace("bbox", "bbox_2d"), True),
    (SAM_R1, SAM_R1_PAYLOAD.replace('"', "'"), True),
    (SAM_R1, SAM_R1_PAYLOAD.replace('"bbox"', "'bbox'"), True),
    (SAM_R1, SAM_R1_PAYLOAD.replace("}", ',"note":"the dog\'s"}'), False),
    (SEG_ZERO, SEG_ZERO_PAYLOAD, False),
    (SEG_ZERO, f"```json\n{SEG_ZERO_PAYLOAD}\n```", False),
    (SEG_ZERO, f"[{SEG_ZERO_PAYLOAD}]", False),
    (SEG_ZERO, SEG_ZERO_PAYLOAD.replace("'bbox'", '"bbox"'), False),
    (SEG_ZERO, SEG_ZERO_PAYLOAD.replace("}", ", 'note': \"the dog's\"}"), False),
    (SEG_ZERO, SEG_ZERO_PAYLOAD.replace("}", ", 'note': 'the dog\\'s \"tail\"'}"), False),
    (SEG_ZERO, SEG_ZERO_PAYLOAD.replace("bbox", "bbox_2d"), True),
    (REASONER, REASONER_PAYLOAD, False),
    (REASONER, f"```json\n{REASONER_PAYLOAD}\n```", True),
    (REASONER, OBJECT, True),
    (REASONER, REASONER_PAYLOAD.replace("bbox_2d", "bbox"), True),
    (REASONER, REASONER_PAYLOAD.replace('"', "'"), True),
]


@pytest.mark.parametrize(("grammar", "payload", "loose"), LOOSE)
def test_what_base_models_write_is_read_and_marked_where_the_released_parser_would_not(
    grammar: Grammar, payload: str, loose: bool
) -> None:
    parsed = grammar.parse(answered(payload), FRAME)
    assert (parsed.fault, parsed.loose) == (None, loose)
    plain = {SAM_R1: SAM_R1_PAYLOAD, SEG_ZERO: SEG_ZERO_PAYLOAD}.get(grammar, REASONER_PAYLOAD)
    meant = grammar.parse(answered(f"[{OBJECT}]" if payload is OBJECT else plain), FRAME).prompt
    for part in ("boxes", "points", "labels"):
        assert getattr(parsed.prompt, part).tolist() == getattr(meant, part).tolist()


def test_a_full_stop_behind_the_answer_is_more_than_the_released_parsers_take() -> None:
    assert SAM_R1.parse(answered(SAM_R1_PAYLOAD) + ".", FRAME).rest == "."


def test_box_k_and_point_k_are_one_object_and_say_so() -> None:
    assert REASONER.parse(answered(REASONER_PAYLOAD), FRAME).prompt.paired
    assert not SAM_R1.parse(answered(SAM_R1_PAYLOAD), FRAME).prompt.paired


# --- where boxes and points are complete


PRETTY = json.dumps(json.loads(SAM_R1_PAYLOAD), indent=2)


@pytest.mark.parametrize(
    "thought", [THOUGHT, "<think> [1,2] <answer>[3]</answer> \U0001f41f </think> see [4]: "]
)
@pytest.mark.parametrize(
    "payload", [SAM_R1_PAYLOAD, PRETTY, SAM_R1_PAYLOAD.replace(",", " ,\t").replace("]", "\n]")]
)
@pytest.mark.parametrize("behind", ["", " and [5,6]"])
def test_a_box_is_complete_at_its_closing_bracket_and_so_is_each_point(
    thought: str, payload: str, behind: str
) -> None:
    text = answered(payload, thought) + behind
    ends = [end for end, _ in SAM_R1.unfold(text, FRAME)]
    closed = ["".join(text[:end].split()).rpartition("[")[1:] for end in ends]
    assert closed == [("[", "10,20,30,40]"), ("[", "20,30,1]"), ("[", "90,190,0]")]
    assert all(text[end - 1] == "]" for end in ends)


def test_a_box_written_last_is_said_last() -> None:
    text = answered('{"points":[[20,30,1],[90,190,0]],"bbox":[10,20,30,40]}')
    steps = SAM_R1.unfold(text, FRAME)
    assert [text[:end].rpartition("[")[2] for end, _ in steps] == ["20,30,1]", "90,190,0]", "10,20,30,40]"]
    assert [(len(p.boxes), len(p.points)) for _, p in steps] == [(0, 1), (0, 2), (1, 2)]


# --- what is written


PROMPT = MaskPrompt.of([[0.1, 0.1, 0.3, 0.2]], [[0.2, 0.15], [0.25, 0.175]], [1, 1])


def test_each_grammar_writes_json_that_any_reader_reads() -> None:
    said = Parsed(thought="two fish", prompt=PROMPT)
    assert SAM_R1.render(said, FRAME) == (
        "<think> two fish </think> To generate the mask of the target object, "
        '<answer>{"bbox":[10,20,30,40],"points":[[20,30,1],[25,35,1]]}</answer>'
    )
    assert SEG_ZERO.render(said, FRAME) == (
        "<think> two fish </think>\n"
        '<answer>{"bbox":[10,20,30,40],"points_1":[20,30],"points_2":[25,35]}</answer>'
    )
    one = Parsed(thought="two fish", prompt=MaskPrompt.of(PROMPT.boxes, PROMPT.points[:1], [1]))
    assert REASONER.render(one, FRAME) == (
        '<think> two fish </think>\n<answer>[{"bbox_2d":[10,20,30,40],"point_2d":[20,30]}]</answer>'
    )
    assert '"points_1":[20,30],"points_2":[20,30]' in SEG_ZERO.render(one, FRAME)


BOX, POINT = [0, 0, 0.5, 1], [0.5, 0.5]
UNWRITABLE: list[tuple[Grammar, MaskPrompt, str]] = [
    (SAM_R1, MaskPrompt.of([BOX] * 2, [POINT], [1]), "1 box .* got 2 and 1"),
    (SAM_R1, MaskPrompt.of([], [POINT], [1]), "1 box .* got 0 and 1"),
    (SAM_R1, MaskPrompt.of([BOX]), "1 to 3 points .* got 1 and 0"),
    (SAM_R1, MaskPrompt.of([BOX], [POINT] * 4, [1] * 4), "1 to 3 points .* got 1 and 4"),
    (SEG_ZERO, MaskPrompt.of([BOX] * 2, [POINT] * 2, [1, 1]), "1 box .* got 2 and 2"),
    (SEG_ZERO, MaskPrompt.of([BOX]), "1 or 2 foreground points"),
    (SEG_ZERO, MaskPrompt.of([BOX], [POINT] * 3, [1] * 3), "1 or 2 foreground points"),
    (SEG_ZERO, MaskPrompt.of([BOX], [POINT] * 2, [1, 0]), "foreground"),
    (REASONER, MaskPrompt.of([BOX], [POINT], [0]), "foreground"),
    (REASONER, MaskPrompt.of([BOX], [POINT] * 2, [1, 1]), "as many boxes as foreground points"),
    (REASONER, MaskPrompt.of([BOX] * 3, [POINT] * 3, [1] * 3), "at most 2"),
]


@pytest.mark.parametrize(("grammar", "prompt", "needed"), UNWRITABLE)
def test_what_could_not_be_read_back_is_not_written(
    grammar: Grammar, prompt: MaskPrompt, needed: str
) -> None:
    with pytest.raises(ValueError, match=needed):
        grammar.render(Parsed(prompt=prompt), FRAME)


@every_grammar
@pytest.mark.parametrize("tag", ["<think>", "</think>", "<answer>", "</answer>"])
def test_a_thought_with_a_tag_is_not_written(grammar: Grammar, payload: str, tag: str) -> None:
    prompt = grammar.parse(answered(payload), FRAME).prompt
    with pytest.raises(ValueError, match="tag"):
        grammar.render(Parsed(thought=f"a {tag} b", prompt=prompt), FRAME)


# --- the question


def asked(grammar: Grammar, query: str | None) -> str:
    """Return the text of the one user message, which follows the image."""
    (message,) = grammar.messages(query)
    image, text = message["content"]
    assert (message["role"], image) == ("user", {"type": "image"})
    return text["text"]


@every_grammar
@pytest.mark.parametrize("query", ["the Left fish", "the Left fish.", " the Left fish. \n"])
def test_the_query_is_asked_for_without_its_period(grammar: Grammar, payload: str, query: str) -> None:
    name = "the left fish" if grammar is SEG_ZERO else "the Left fish"
    quote = "'" if grammar is SEG_ZERO else '"'
    assert f"{quote}{name}{quote}" in asked(grammar, query)
    assert "{Question}" not in asked(grammar, query)


@every_grammar
def test_without_a_query_the_primary_object_is_asked_for(grammar: Grammar, payload: str) -> None:
    assert "the primary object" in asked(grammar, None)
    assert asked(grammar, None) == asked(grammar, "the primary object")


@pytest.mark.parametrize(
    ("grammar", "boxes", "points"),
    [
        (SAM_R1, [[10, 100, 200, 210]], [[30, 110], [35, 180]]),
        (SEG_ZERO, [[10, 100, 200, 210]], [[30, 110], [35, 180]]),
        (REASONER, [[10, 100, 200, 210], [225, 296, 706, 786]], [[30, 110], [302, 410]]),
        (SegR1Tags(max_boxes=1, max_points=2), [[1, 2, 3, 4]], [[5, 6], [7, 8]]),
        (SegR1Released(max_boxes=1, max_points=2), [[1, 2, 3, 4]], [[5, 6], [7, 8]]),
        (SegR1Points(max_points=2), [], [[1, 2], [3, 4]]),
    ],
    ids=[*IDS, "seg_r1_tags", "seg_r1_released", "seg_r1_points"],
)
def test_the_answer_that_a_question_gives_as_its_example_is_one(
    grammar: Grammar, boxes: list[list[int]], points: list[list[int]]
) -> None:
    text = grammar.messages(None)[-1]["content"][1]["text"]
    text = text[max(text.rfind("<think>"), 0) :].replace(",...]", "]")  # the number of points is left open
    for name, number in zip(["x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4"], "12345678", strict=True):
        text = text.replace(name, number)
    parsed = grammar.parse(text, absolute_pixels(1000, 1000))
    assert parsed.fault is None
    close(parsed.prompt.boxes, np.array(boxes, float).reshape(-1, 4) / 1000)
    close(parsed.prompt.points, np.array(points) / 1000)
