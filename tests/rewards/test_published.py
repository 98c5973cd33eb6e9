"""`reward=seg_r1_published grammar=seg_r1_released` pays what Seg-R1's released code pays.

The oracle is not its code.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from segrl.prompts.frames import absolute_pixels
from segrl.prompts.released import SegR1Released
from segrl.prompts.tags import SegR1Tags
from segrl.rewards.mask import segment_as_published
from segrl.rewards.text import parses
from segrl.types import Answer, Sample

_FILE = Path(__file__).resolve().parents[1] / "oracles" / "seg_r1_released.py"
_SPEC = importlib.util.spec_from_file_location("seg_r1_released", _FILE)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

FRAME, RELEASED, TAGS = absolute_pixels(1000, 1000), SegR1Released(64, 512), SegR1Tags(16, 64)
TRUTH = np.zeros((20, 20), bool)
TRUTH[:10, :10] = True  # a quarter of the image
SAMPLE = Sample(id="s", image=np.zeros((20, 20, 3), np.uint8), mask=TRUTH)
BOX, POINTS, LABELS = (
    "<bbox>[10,20,300,400]</bbox>",
    "<points>[[30,40],[50,60]]</points>",
    "<labels>[1,0]</labels>",
)
ANSWER = f"{BOX}, {POINTS}, {LABELS}"
GOOD = f"<think> a </think> {ANSWER}"
FULL, NO_FORMAT = 0.7 + 0.3 * 0.75 + 1, 0.7 + 0.3 * 0.75

# Text; what the released code pays where the mask is the truth; what grammar=seg_r1_tags makes of it.
TABLE = {
    "as asked": (GOOD, FULL, FULL),
    "no thought": (ANSWER, NO_FORMAT, 0),
    "an unclosed thought": (f"<think> a {ANSWER}", NO_FORMAT, 0),
    "an empty thought": (GOOD.replace(" a ", ""), FULL, FULL),
    "a comma closes the list": (GOOD.replace("60]]", "60],]"), FULL, 0),
    "boxes, points and labels of each object": (f"{GOOD} {ANSWER}", FULL, 0),
    "17 boxes": (GOOD.replace(BOX, BOX * 17), FULL, 0),
    "65 points": (GOOD.replace("[[", "[" + "[1,1]," * 63 + "[").replace("[1,0]", f"[{'1,' * 64}0]"), FULL, 0),
    "two thoughts": (f"<think> b </think> {GOOD}", FULL, 0),
    "the answer inside the thought": (f"<think> a {ANSWER} </think>", FULL, 0),
    "fractions": (GOOD.replace("30,40", "30.5,40"), 0, FULL),
    "a sign": (GOOD.replace("30,40", "-30,40"), 0, FULL),
    "a box alone": (f"<think> a </think> {BOX}", 0, 0),
    "a leading zero": (GOOD.replace("30,40", "030,40"), 0, FULL),
    "labels too few": (GOOD.replace("[1,0]", "[1]"), 0, 0),
    "rambling on": (f"{GOOD} and so on", FULL, FULL),
    "words in between": (GOOD.replace(", <", " and then <"), FULL, FULL),
    "nothing": ("", 0, 0),
}


def paid(grammar: SegR1Released | SegR1Tags, text: str) -> float:
    parsed = grammar.parse(text, FRAME)
    mask = TRUTH if parsed.prompt is not None else np.zeros_like(TRUTH)
    answer = Answer(text=text, parsed=parsed, mask=mask, length=1, finished=True)
    return segment_as_published(answer, SAMPLE) + parses(answer, SAMPLE)


@pytest.mark.parametrize("kind", TABLE)
def test_what_the_released_code_pays_is_paid(kind: str) -> None:
    text, released, tags = TABLE[kind]
    assert oracle.segment_paid(text, 1.0, 0.25) + oracle.format_paid(text) == pytest.approx(released)
    assert paid(RELEASED, text) == pytest.approx(released)
    assert paid(TAGS, text) == pytest.approx(tags)


@pytest.mark.parametrize(
    "text", [GOOD.replace("[1,0]", "[1,2]"), GOOD.replace("[10,20,300,400]", "[300,20,10,400]")]
)
def test_what_the_released_code_pays_and_segrl_never_does(text: str) -> None:
    assert oracle.format_paid(text) == 1.0 and paid(RELEASED, text) == 0.0


FRAGMENTS = [
    "<think>", "</think>", "<bbox>", "</bbox>", "<points>", "</points>", "<labels>", "</labels>", "[", "]",
    "[[", "]]", ",", ",,", " ", "1", "0", "01", "00", "[1,0]", "[[1,2]]", "10", "\n", "],[", "] [", ",]",
    ".5", "-1", BOX, POINTS, LABELS,
]  # fmt: skip


def beyond(read: oracle.Read) -> bool:
    """Return whether a text holds what segrl counts as a fault."""
    points, labels, boxes = read
    thin = any(min(b[2], 1000) <= min(b[0], 1000) or min(b[3], 1000) <= min(b[1], 1000) for b in boxes)
    return thin or any(label not in (0, 1) for label in labels) or max(map(max, [*points, *boxes])) > 999_999


def test_accidents_are_read_as_the_released_code_reads_them() -> None:
    rng, agreed = random.Random(20261128), 0
    for _ in range(4_000):
        text = GOOD
        for _ in range(rng.randint(0, 4)):
            i = rng.randrange(len(text) + 1)
            j = min(len(text), i + rng.randint(0, 6 if rng.random() < 0.7 else 60))
            text = text[:i] + rng.choice([*FRAGMENTS, text[i:j], ""]) + text[rng.choice([i, j]) :]
        read, parsed = oracle.read(text), RELEASED.parse(text, FRAME)
        if read is not None and beyond(read):
            continue
        assert (read is None) == (parsed.prompt is None), text
        if read is not None:
            agreed += 1
            points, labels, boxes = read
            np.testing.assert_allclose(parsed.prompt.points * 1000, np.clip(points, 0, 1000), atol=0.01)
            np.testing.assert_allclose(parsed.prompt.boxes * 1000, np.clip(boxes, 0, 1000), atol=0.01)
            assert parsed.prompt.labels.tolist() == labels
            assert parsed.loose == (oracle.format_paid(text) == 0.0), text
    assert agreed > 800
