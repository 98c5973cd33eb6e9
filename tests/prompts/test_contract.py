"""What every grammar promises: what it writes it reads, and whatever it reads it survives, in linear time."""

import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrl.prompts.answer_json import SamR1Json, SegZeroJson, VisionReasonerJson
from segrl.prompts.frames import absolute_pixels, permille
from segrl.prompts.tags import SegR1Points, SegR1Tags
from segrl.types import MaskPrompt, Parsed

# Grammar, number of boxes, number of points, whether points may be background.
GRAMMARS = {
    "seg_r1_tags": (SegR1Tags(4, 8), (1, 4), (1, 8), True),
    "seg_r1_points": (SegR1Points(8), (0, 0), (1, 8), True),
    "sam_r1_json": (SamR1Json(8), (1, 1), (1, 8), True),
    "seg_zero_json": (SegZeroJson(), (1, 1), (2, 2), False),
    "vision_reasoner_json": (VisionReasonerJson(4), (0, 4), None, False),
}
FRAMES = (permille(10, 10), absolute_pixels(height=756, width=756), absolute_pixels(height=389, width=1021))
FUZZED = 20_000  # of each grammar


@st.composite
def said(draw, name):
    _, boxes, points, background = GRAMMARS[name]
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    k = draw(st.integers(*boxes))
    q = k if points is None else draw(st.integers(*points))
    corners = rng.uniform(0, 0.8, (k, 2))
    prompt = MaskPrompt.of(
        np.concatenate([corners, corners + rng.uniform(0.05, 0.2, (k, 2))], 1),
        rng.uniform(0, 1, (q, 2)),
        rng.integers(0, 2, q) if background else np.ones(q),
    )
    thought = draw(st.text(max_size=30).filter(lambda t: "think>" not in t and "answer>" not in t))
    return Parsed(thought=thought, prompt=prompt), draw(st.sampled_from(FRAMES))


@pytest.mark.parametrize("name", GRAMMARS)
@given(data=st.data())
def test_what_is_written_is_read_back_within_half_a_unit(name, data):
    grammar = GRAMMARS[name][0]
    meant, frame = data.draw(said(name))
    text = grammar.render(meant, frame)
    read = grammar.parse(text, frame)
    assert (read.fault, read.rest) == (None, "")
    extent = np.array([frame.width, frame.height])
    for got, wanted in ((read.prompt.boxes, meant.prompt.boxes), (read.prompt.points, meant.prompt.points)):
        error = np.abs(got.astype(np.float64) - wanted) * np.resize(extent, wanted.shape[1])
        assert error.max(initial=0.0) <= 0.5 + 1e-3
    assert read.prompt.labels.tolist() == meant.prompt.labels.tolist()
    if "thought" in grammar.says:
        assert read.thought == meant.thought.strip()
    if "ends" in grammar.says:
        assert len(read.ends) == len(read.prompt.boxes) + len(read.prompt.points)
        assert all(0 < end <= len(text) for end in read.ends)


def examples(name):
    """A few completions to spoil."""
    grammar, boxes, points, _ = GRAMMARS[name]
    rng = np.random.default_rng(0)
    for frame in FRAMES:
        k = boxes[1]
        q = k if points is None else points[1]
        low = rng.uniform(0, 0.5, (k, 2))
        prompt = MaskPrompt.of(np.concatenate([low, low + 0.3], 1), rng.uniform(0, 1, (q, 2)), np.ones(q))
        yield grammar.render(Parsed(thought="there", prompt=prompt), frame)


PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<bbox>", "</bbox>", "<points>", "</points>", "<labels>", "</labels>",
    "[", "]", "[[", "]]", "{", "}", '"bbox"', '"points"', "bbox_2d", "null", "true", "NaN", "-Infinity", "1e999", "-1", "0.5", "9" * 40,
    "\x00", "\ud800", "\u202e", "\U0001f41f", "'", '"', ",", ":", " ", "\n", "1", "0", "00",
]  # fmt: skip


def spoiled(text, rng):
    """Cut, pasted, doubled, or sprinkled."""
    for _ in range(rng.randrange(1, 4)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        match rng.randrange(5):
            case 0:
                text = text[:i]
            case 1:
                text = text[:i] + text[j:]
            case 2:
                text = text[:j] + text[i:]
            case 3:
                text = text[:i] + rng.choice(PIECES) + text[i:]
            case _:
                text = text[:i] + rng.choice(PIECES) * rng.randrange(1, 5) + text[j:]
    return text


def sound(parsed):
    """A prompt or a fault, and nothing in a prompt that a mask head could choke on."""
    assert (parsed.prompt is None) != (parsed.fault is None)
    if parsed.prompt is not None:
        boxes, points, labels = parsed.prompt.boxes, parsed.prompt.points, parsed.prompt.labels
        assert boxes.dtype == points.dtype == np.float32 and labels.dtype == np.int64
        assert ((boxes >= 0) & (boxes <= 1)).all() and ((points >= 0) & (points <= 1)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and np.isin(labels, (0, 1)).all()
        assert len(points) == len(labels)


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_spoiled_completion_raises_nothing(name):
    grammar, rng, texts = GRAMMARS[name][0], random.Random(0), list(examples(name))
    faults = set()
    began = time.process_time()
    for n in range(FUZZED):
        parsed = grammar.parse(spoiled(texts[n % len(texts)], rng), FRAMES[n % 3])
        sound(parsed)
        faults.add(parsed.fault)
    assert len(faults) > 4  # the spoiling reaches most of the grammar
    assert (time.process_time() - began) / FUZZED < 2e-3


LONG = {
    "digits": lambda text: text.replace("0", "1" * 100_000, 1),
    "digits alone": lambda text: "1" * 100_000,
    "open brackets": lambda text: text.replace("[", "[" * 100_000, 1),
    "open braces": lambda text: text.replace("<answer>", "<answer>" + '{"bbox":' * 12_000, 1),
    "thoughts": lambda text: "<think>" * 14_000 + text,
    "closed thoughts": lambda text: "<think></think>" * 7_000 + text,
    "boxes": lambda text: text + "<bbox>[1,2,3,4]</bbox>" * 5_000,
    "answers": lambda text: text + "<answer>[]</answer>" * 5_000,
    "spaces": lambda text: text.replace(",", " " * 100_000 + ",", 1),
    "points": lambda text: text.replace("[[", "[[1,2]," + "[3,4]," * 16_000 + "[", 1),
    "rambling": lambda text: text + " and so on" * 10_000,
}


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("kind", LONG)
def test_a_hundred_kilobytes_are_read_in_ten_milliseconds(name, kind):
    grammar = GRAMMARS[name][0]
    text = LONG[kind](next(examples(name)))
    spent = []
    for _ in range(3):
        began = time.thread_time()
        sound(grammar.parse(text, FRAMES[0]))
        spent.append(time.thread_time() - began)
    assert min(spent) < 0.01
