from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_cdt

from segrl.metrics.functional.boundary import boundary_accuracy, boundary_iou, correction_effort
from segrl.metrics.functional.tally import above_half

SHAPE = (80, 100)
EMPTY, FULL = np.zeros(SHAPE, bool), np.ones(SHAPE, bool)
PAIRS = hnp.array_shapes(min_dims=2, max_dims=2, max_side=14).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(bool, shape, elements=st.booleans(), fill=st.nothing())] * 2)
)


def rectangle(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = EMPTY.copy()
    mask[top : top + height, left : left + width] = True
    return mask


def discs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a mask and a truth of 150 x 170 pixels that differ by a shift and by their radius."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:150, :170]
    (cy, cx), radius = rng.uniform((20, 20), (130, 150)), rng.uniform(6, 40)
    truth = np.hypot(y - cy, x - cx) < radius
    return np.hypot(y - cy - rng.normal(0, 3), x - cx - rng.normal(0, 3)) < radius * rng.uniform(
        0.8, 1.2
    ), truth


# --- boundary IoU


def test_boundary_iou_of_a_smaller_square_by_hand() -> None:
    # 2 % of hypot(80, 100) = 128.06 is 2.56, rounded 3: rims are 3 pixels wide. The inner square is smaller
    # by one pixel on each side, so its rim shares 2 of the 3.
    outer, inner = rectangle(20, 30, 20, 30), rectangle(21, 31, 18, 28)
    rim_outer, rim_inner = 20 * 30 - 14 * 24, 18 * 28 - 12 * 22
    shared = 18 * 28 - 14 * 24
    assert boundary_iou(inner, outer) == shared / (rim_outer + rim_inner - shared)


def test_the_edge_of_the_image_is_outline() -> None:
    assert boundary_iou(rectangle(0, 0, 80, 100), FULL) == 1.0
    holed = FULL.copy()
    holed[30:50, 40:60] = False
    rim, around_hole = 80 * 100 - 74 * 94, 26 * 26 - 20 * 20
    assert boundary_iou(holed, FULL) == rim / (rim + around_hole)


@pytest.mark.parametrize(
    ("mask", "truth", "value"),
    [(EMPTY, EMPTY, 1.0), (FULL, FULL, 1.0), (EMPTY, FULL, 0.0), (FULL, EMPTY, 0.0)],
)
def test_boundary_iou_without_an_object(mask: np.ndarray, truth: np.ndarray, value: float) -> None:
    assert boundary_iou(mask, truth) == value


@given(st.integers(0, 10**6))
def test_a_rim_is_what_lies_within_a_chessboard_distance_of_the_outside(seed: int) -> None:
    mask, truth = discs(seed)
    width = max(1, round(0.02 * math.hypot(*truth.shape)))
    rims = []
    for of in (mask, truth):
        depth = distance_transform_cdt(np.pad(of, 1), "chessboard")[1:-1, 1:-1]
        rims.append((depth > 0) & (depth <= width))
    assert boundary_iou(mask, truth) == (rims[0] & rims[1]).sum() / (rims[0] | rims[1]).sum()


@given(PAIRS)
def test_boundary_iou_is_symmetric_and_knows_no_direction(pair: tuple[np.ndarray, np.ndarray]) -> None:
    mask, truth = pair
    value = boundary_iou(mask, truth)
    assert 0 <= value <= 1
    assert value == boundary_iou(truth, mask) == boundary_iou(mask.T, truth.T)
    assert value == boundary_iou(mask[::-1, ::-1], truth[::-1, ::-1])
    assert boundary_iou(truth, truth) == 1.0


# --- mean boundary accuracy


def test_boundary_accuracy_of_a_wrong_pixel_by_hand() -> None:
    # (80 + 100) / 300 < 1: all five radii are 1. An ellipse of 3 x 3 is a cross: the band around 10 x 10 has
    # 36 pixels inside and 40 outside.
    truth = rectangle(20, 30, 10, 10)
    one_out = truth.copy()
    one_out[20, 40] = True
    assert boundary_accuracy(one_out, truth) == pytest.approx(75 / 76, abs=1e-15)
    far = truth.copy()
    far[70, 80] = True
    assert boundary_accuracy(far, truth) == 1.0
    assert boundary_accuracy(EMPTY, truth) == pytest.approx(40 / 76, abs=1e-15)


@pytest.mark.parametrize(
    ("mask", "truth", "value"),
    [
        (EMPTY, EMPTY, 1.0),
        (FULL, FULL, 1.0),
        (EMPTY, FULL, 0.0),
        (FULL, EMPTY, 0.0),
        (rectangle(0, 0, 2, 2), EMPTY, 0.0),
    ],
)
def test_a_truth_without_outline_is_matched_or_not(mask: np.ndarray, truth: np.ndarray, value: float) -> None:
    assert boundary_accuracy(mask, truth) == value


def ellipse(radius: int) -> np.ndarray:
    """Build OpenCV's ellipse: in each row the half-width of the circle, rounded."""
    footprint = np.zeros((2 * radius + 1, 2 * radius + 1), bool)
    for dy in range(-radius, radius + 1):
        reach = round(math.sqrt(radius**2 - dy**2))
        footprint[dy + radius, radius - reach : radius + reach + 1] = True
    return footprint


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_boundary_accuracy_is_agreement_in_five_growing_bands(seed: int) -> None:
    mask, truth = (np.pad(m, 300) for m in discs(seed))  # (750 + 770) / 300 = 5.07: radii 1, 1, 2, 3, 4
    shares = []
    for radius in (1, 1, 2, 3, 4):
        near = binary_dilation(truth, ellipse(radius)) & ~binary_erosion(truth, ellipse(radius))
        shares.append((mask == truth)[near].mean())
    assert boundary_accuracy(mask, truth) == pytest.approx(np.mean(shares), abs=1e-12)


@given(PAIRS)
def test_boundary_accuracy_is_a_share(pair: tuple[np.ndarray, np.ndarray]) -> None:
    mask, truth = pair
    value = boundary_accuracy(mask, truth)
    assert 0 <= value <= 1
    assert boundary_accuracy(truth, truth) == 1.0
    assert value + boundary_accuracy(~mask, truth) == pytest.approx(1.0) or truth.all() or not truth.any()


# --- human correction effort


def test_a_missed_square_costs_its_outline_and_a_false_one_a_click() -> None:
    truth = rectangle(10, 10, 50, 40) | rectangle(10, 70, 20, 20)
    assert correction_effort(truth, truth) == 0
    # Eroded to 10 x 10 and grown by a diamond of 5, the square is an octagon. An outline is an open line,
    # which a ninth point closes.
    assert correction_effort(rectangle(10, 10, 50, 40), truth) == 9
    assert correction_effort(truth | rectangle(60, 60, 15, 30), truth) == 1


def test_an_outline_within_five_pixels_costs_nothing_but_a_lost_line_does() -> None:
    truth = rectangle(20, 20, 40, 60)
    assert correction_effort(rectangle(21, 21, 40, 60), truth) == 0
    line = truth | rectangle(40, 80, 2, 15)
    assert correction_effort(truth, line) > 0


def test_small_maps_cost_what_pysodmetrics_says(small: dict) -> None:
    for name, pair in small.items():
        assert correction_effort(above_half(pair.saliency), pair.truth) == pair.expected["hce"], name


def test_every_real_map_costs_what_pysodmetrics_says(published: dict) -> None:
    compared = 0
    for name, group in published.items():
        for stem, pair in group.pairs.items():
            if "hce" in pair.expected:
                compared += 1
                found = correction_effort(above_half(pair.saliency), pair.truth)
                assert found == pair.expected["hce"], (name, stem)
    assert compared == 338


@given(PAIRS)
def test_strided_arrays_score_as_their_contiguous_copies(pair: tuple[np.ndarray, np.ndarray]) -> None:
    for score in (boundary_accuracy, correction_effort, boundary_iou):
        for turn in (np.s_[::-1, ::-1], np.s_[::2]):
            packed = [np.ascontiguousarray(m[turn]) for m in pair]
            assert score(*(m[turn] for m in pair)) == score(*packed)
        packed = [np.ascontiguousarray(m.T) for m in pair]
        assert score(*(m.T for m in pair)) == score(*packed)
