from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrl.data.annotator import Annotator
from segrl.data.synthetic import SyntheticScenes
from segrl.geometry import components, inner_point, tight_box
from segrl.prompts.frames import permille
from segrl.prompts.tags import SegR1Tags
from segrl.types import MaskPrompt


def blocks(*corners: tuple[int, int, int, int], shape: tuple[int, int] = (40, 60)) -> np.ndarray:
    """Return a mask of rectangles given by top, left, bottom, right."""
    mask = np.zeros(shape, bool)
    for top, left, bottom, right in corners:
        mask[top:bottom, left:right] = True
    return mask


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Draw one to four ellipses in an image of any shape; the mask has at least one pixel."""
    height, width = draw(st.integers(3, 50)), draw(st.integers(3, 50))
    rng, (y, x) = np.random.default_rng(draw(st.integers(0, 10**6))), np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 4))):
        cy, cx, ry, rx = (
            rng.uniform(0, height),
            rng.uniform(0, width),
            rng.uniform(0.3, height / 2),
            rng.uniform(0.3, width / 2),
        )
        mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    mask[rng.integers(height), rng.integers(width)] = True
    return mask


def shows(mask: np.ndarray, point: np.ndarray) -> bool:
    """Return whether a unit point lies on a true pixel."""
    height, width = mask.shape
    return bool(mask[min(int(point[1] * height), height - 1), min(int(point[0] * width), width - 1)])


# --- boxes


def test_a_tight_box_by_hand() -> None:
    # rows 10..19 of 40, columns 15..44 of 60
    np.testing.assert_allclose(tight_box(blocks((10, 15, 20, 45))), [0.25, 0.25, 0.75, 0.5])


def test_a_tight_box_of_one_pixel_and_of_everything() -> None:
    np.testing.assert_allclose(tight_box(blocks((39, 59, 40, 60))), [59 / 60, 39 / 40, 1, 1])
    assert tight_box(np.ones((4, 5), bool)).tolist() == [0, 0, 1, 1]


@given(masks())
def test_a_tight_box_holds_every_pixel_and_touches_one_on_each_side(mask: np.ndarray) -> None:
    height, width = mask.shape
    left, top, right, bottom = np.rint(tight_box(mask) * [width, height, width, height]).astype(int)
    assert mask[top:bottom, left:right].sum() == mask.sum()
    for side in (mask[top, :], mask[bottom - 1, :], mask[:, left], mask[:, right - 1]):
        assert side.any()


def test_an_empty_mask_has_no_tight_box() -> None:
    with pytest.raises(ValueError, match="mask: must hold an object"):
        tight_box(np.zeros((4, 4), bool))


# --- points


def test_the_inner_point_of_a_square_is_its_middle() -> None:
    np.testing.assert_allclose(inner_point(blocks((10, 20, 21, 31))), [25.5 / 60, 15.5 / 40])


def test_the_inner_point_of_a_ring_is_not_in_its_hole() -> None:
    y, x = np.mgrid[:50, :50]
    radius = np.hypot(y - 25, x - 25)
    ring = (radius < 22) & (radius > 12)
    point = inner_point(ring)
    assert shows(ring, point)
    assert np.hypot(*(point * 50 - 25.5)) == pytest.approx(17, abs=1.5)  # the middle of the band


def test_the_inner_point_knows_the_images_border_as_an_end_of_the_object() -> None:
    assert inner_point(np.ones((41, 21), bool))[0] == pytest.approx(0.5)


@given(masks())
def test_the_inner_point_lies_on_the_object_and_as_deep_as_any(mask: np.ndarray) -> None:
    point = inner_point(mask)
    assert shows(mask, point)
    height, width = mask.shape
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    depths = [np.hypot(*(outside - at).T).min() for at in np.argwhere(mask)]
    own = np.hypot(*(outside - [int(point[1] * height), int(point[0] * width)]).T).min()
    assert own == pytest.approx(max(depths))


# --- parts


def test_parts_come_largest_first_and_no_more_than_asked() -> None:
    mask = blocks((0, 0, 4, 4), (10, 10, 20, 20), (30, 30, 36, 36))
    assert [int(part.sum()) for part in components(mask, least=0.0, most=9)] == [100, 36, 16]
    assert [int(part.sum()) for part in components(mask, least=0.0, most=2)] == [100, 36]


def test_small_parts_are_left_out_but_the_largest_stays_however_small() -> None:
    mask = blocks((0, 0, 4, 4), (10, 10, 20, 20))  # 16 and 100 of 2400 pixels
    assert [int(part.sum()) for part in components(mask, least=0.01, most=9)] == [100]
    assert [int(part.sum()) for part in components(mask, least=0.5, most=9)] == [100]
    assert components(np.zeros((5, 5), bool), least=0.0, most=9) == []


@given(masks())
def test_all_parts_together_are_the_mask(mask: np.ndarray) -> None:
    parts = components(mask, least=0.0, most=10**6)
    assert (np.sum(parts, 0) == mask).all()


# --- traces


def trace(
    mask: np.ndarray, looseness: float = 0.0, grid: int = 1000, most_parts: int = 4, seed: int = 0
) -> MaskPrompt:
    return Annotator(looseness, grid, most_parts).annotate(mask, np.random.default_rng(seed)).prompt


def test_without_looseness_the_box_is_tight_up_to_the_grid() -> None:
    # a grid of 20 holds this box exactly; one of 8 rounds 0.75 / 0.45 / 0.3 to eighths
    mask = blocks((8, 15, 18, 45))
    np.testing.assert_allclose(trace(mask, grid=20).boxes, [[0.25, 0.2, 0.75, 0.45]], atol=1e-7)
    np.testing.assert_allclose(trace(mask, grid=8).boxes, [[0.25, 0.25, 0.75, 0.5]], atol=1e-7)


@given(masks(), st.sampled_from([50, 756, 1000]), st.integers(0, 99))
def test_without_looseness_every_side_is_within_half_a_grid_step(
    mask: np.ndarray, grid: int, seed: int
) -> None:
    prompt = trace(mask, grid=grid, seed=seed)
    tight = np.stack([tight_box(part) for part in components(mask, 0.005, 4)])
    assert np.abs(prompt.boxes - tight).max() <= 0.5 / grid + 1e-6
    np.testing.assert_allclose(prompt.boxes * grid, np.rint(prompt.boxes * grid), atol=1e-3)


@given(masks(), st.integers(0, 99))
def test_looseness_moves_sides_outwards_by_its_share_at_most(mask: np.ndarray, seed: int) -> None:
    loose = trace(mask, looseness=0.3, seed=seed).boxes
    tight = np.stack([tight_box(part) for part in components(mask, 0.005, 4)])
    extent = np.tile(tight[:, 2:] - tight[:, :2], 2)
    outwards = (loose - tight) * [-1, -1, 1, 1]
    assert (outwards >= -0.0006).all()
    assert (outwards <= 0.3 * extent + 0.0006).all()
    assert ((loose >= 0) & (loose <= 1)).all()


def test_looseness_is_drawn_anew_for_every_side_and_trace() -> None:
    mask = blocks((15, 20, 25, 40))
    boxes = np.stack([trace(mask, looseness=0.5, seed=seed).boxes[0] for seed in range(40)])
    outwards = (boxes - tight_box(mask)) * [-1, -1, 1, 1] / np.tile([1 / 3, 1 / 4], 2)
    assert outwards.mean(0) == pytest.approx(0.25, abs=0.1)  # uniform in [0, 0.5]
    assert len({tuple(row) for row in np.round(outwards, 2)}) > 30
    assert (np.abs(np.corrcoef(outwards.T) - np.eye(4)) < 0.6).all()


@given(masks(), st.sampled_from([4, 10, 1000]), st.sampled_from([0.0, 0.5]))
def test_a_box_is_at_least_one_grid_step_wide_and_high(mask: np.ndarray, grid: int, looseness: float) -> None:
    boxes = trace(mask, looseness=looseness, grid=grid).boxes
    assert (boxes[:, 2:] - boxes[:, :2] >= 1 / grid - 1e-6).all()
    assert ((boxes >= 0) & (boxes <= 1)).all()


@given(masks())
def test_on_a_grid_finer_than_pixels_each_part_has_a_foreground_point_on_it(mask: np.ndarray) -> None:
    prompt = trace(mask, grid=1000)
    parts = components(mask, 0.005, 4)
    assert len(prompt.boxes) == len(prompt.points) == len(parts)
    assert prompt.labels.tolist() == [1] * len(parts)
    assert all(shows(part, point) for part, point in zip(parts, prompt.points, strict=True))


@pytest.mark.parametrize(
    ("corners", "thought"),
    [
        ((0, 0, 8, 9), "A tiny object, top left."),  # 72 of 2400: 3 %
        ((17, 25, 23, 35), "A tiny object, middle centre."),
        ((26, 45, 40, 60), "A small object, bottom right."),  # 210: 8.75 %
        ((0, 40, 20, 60), "A medium object, top right."),  # 400: 16.7 %
        ((0, 10, 40, 50), "A large object, middle centre."),  # 1600: 67 %
    ],
)
def test_the_thought_says_size_and_place(corners: tuple[int, int, int, int], thought: str) -> None:
    assert Annotator(0.0, 1000, 4).annotate(blocks(corners), np.random.default_rng(0)).thought == thought


def test_the_thought_tells_of_every_part_largest_first() -> None:
    mask = blocks((0, 0, 8, 9), (26, 45, 40, 60))
    expected = "A small object, bottom right. A tiny object, top left."
    assert Annotator(0.0, 1000, 4).annotate(mask, np.random.default_rng(0)).thought == expected
    assert (
        Annotator(0.0, 1000, 1).annotate(mask, np.random.default_rng(0)).thought
        == "A small object, bottom right."
    )


def test_an_empty_mask_has_no_trace() -> None:
    with pytest.raises(ValueError, match="must have an object to write a trace of"):
        trace(np.zeros((9, 9), bool))


def test_every_trace_of_the_synthetic_world_is_a_sentence_of_the_grammar() -> None:
    dataset, grammar = (
        SyntheticScenes("train", 60, 0, 56, (0, 1), (1, 4)),
        SegR1Tags(max_boxes=16, max_points=64),
    )
    frame = permille(56, 56)
    for index in range(60):
        parsed = Annotator(0.4, 1000, 4).annotate(dataset[index].mask, np.random.default_rng(index))
        read = grammar.parse(grammar.render(parsed, frame), frame)
        assert (read.fault, read.thought) == (None, parsed.thought)
        np.testing.assert_allclose(read.prompt.boxes, parsed.prompt.boxes, atol=1e-6)
        np.testing.assert_allclose(read.prompt.points, parsed.prompt.points, atol=1e-6)
