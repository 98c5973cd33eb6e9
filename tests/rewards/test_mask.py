from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, binary_erosion

from segrl.rewards.mask import iou, segment_as_published, structure
from segrl.rewards.mixture import RewardMixture
from segrl.rewards.text import well_formed
from segrl.types import Answer, MaskPrompt, Parsed, ParseFault, Sample

SIDE = 100
ANSWER = Parsed(thought="there", prompt=MaskPrompt.of([[0, 0, 1, 1]], [[0.5, 0.5]], [1]))
FAULT = Parsed(fault=ParseFault.NO_BOX)
EMPTY, FULL = np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool)
MIXTURE = RewardMixture({
    "iou": {"fn": iou, "weight": 0.7},
    "structure": {"fn": structure, "weight": 0.3},
    "format": {"fn": well_formed, "weight": 1.0},
})  # fmt: skip
TERMS = [iou, structure, segment_as_published]


def answer(parsed: Parsed, mask: np.ndarray) -> Answer:
    return Answer(text="text", parsed=parsed, mask=mask, length=1, finished=True)


def sample(truth: np.ndarray) -> Sample:
    return Sample(id="s", image=np.zeros((*truth.shape, 3), np.uint8), mask=truth)


def block(pixels: int) -> np.ndarray:
    """Return a mask of so many pixels around the middle row: whole rows and two halves of a row."""
    mask, whole = EMPTY.copy(), pixels // (2 * SIDE)
    rest = (pixels - 2 * SIDE * whole) // 2
    mask[50 - whole : 50 + whole] = True
    mask[50 - whole - 1, :rest] = mask[50 + whole, :rest] = True
    assert mask.sum() == pixels
    return mask


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = EMPTY.copy()
    mask[top:bottom, left:right] = True
    return mask


def disc(y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.hypot(rows - y, columns - x) < radius


TRUTHS = [
    disc(30, 30, 12), disc(70, 65, 20), disc(50, 50, 8), disc(20, 80, 15), disc(80, 15, 10), disc(45, 40, 28),
    box(5, 5, 25, 60), box(60, 50, 95, 95), disc(30, 70, 9) | disc(70, 25, 14), box(40, 2, 60, 30),
]  # fmt: skip


def paid(term: Callable[..., float], mask: np.ndarray, truth: np.ndarray, parsed: Parsed = ANSWER) -> float:
    return term(answer(parsed, mask), sample(truth))


def mixed(mask: np.ndarray, truth: np.ndarray, parsed: Parsed = ANSWER) -> float:
    return MIXTURE([answer(parsed, mask)], [sample(truth)]).total.item()


# --- each term


@pytest.mark.parametrize("truth", TRUTHS)
def test_a_perfect_mask_earns_all_and_its_inverse_nothing(truth: np.ndarray) -> None:
    assert (paid(iou, truth, truth), paid(iou, ~truth, truth)) == (1.0, 0.0)
    assert paid(structure, truth, truth) == pytest.approx(1.0, abs=1e-9)
    # not 0 for two discs: a quadrant that holds no object and is all painted counts as even
    assert paid(structure, ~truth, truth) < 0.03
    assert mixed(truth, truth) == pytest.approx(2.0, abs=1e-6)
    assert mixed(~truth, truth) < 1.01


def test_half_the_object_by_hand() -> None:
    truth, half = box(40, 40, 60, 60), box(40, 40, 60, 50)
    assert paid(iou, half, truth) == 0.5
    assert paid(segment_as_published, half, truth) == pytest.approx(0.7 * 0.5 + 0.3 * (1 - 0.02))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("fault", list(ParseFault))
@pytest.mark.parametrize("truth", [EMPTY, TRUTHS[0]])
def test_a_fault_earns_nothing_even_where_an_empty_mask_would(
    term: Callable[..., float], fault: ParseFault, truth: np.ndarray
) -> None:
    assert paid(term, EMPTY, truth, Parsed(fault=fault)) == 0.0
    assert paid(term, truth, truth, Parsed(fault=fault)) == 0.0
    assert mixed(EMPTY, truth, Parsed(fault=fault)) == 0.0


def test_no_object_and_none_found_is_right() -> None:
    assert paid(iou, EMPTY, EMPTY) == 1.0
    assert paid(structure, EMPTY, EMPTY) == 1.0
    assert paid(structure, box(0, 0, 50, 50), EMPTY) == 0.75


@pytest.mark.parametrize("term", TERMS)
@given(seed=st.integers(0, 10**6))
def test_a_term_pays_between_nothing_and_one(term: Callable[..., float], seed: int) -> None:
    noise = np.random.default_rng(seed)
    mask, truth = noise.random((2, 20, 20)) < noise.random(2)[:, None, None]
    assert -1e-12 <= paid(term, mask, truth) <= 1 + 1e-12


def test_the_arrays_are_left_as_they_are() -> None:
    mask, truth = box(10, 10, 50, 50), TRUTHS[0].copy()
    for term in TERMS:
        paid(term, mask, truth)
    assert (mask == box(10, 10, 50, 50)).all()
    assert (truth == TRUTHS[0]).all()


# --- the true mixture: 0.7 IoU + 0.3 S + format


def test_the_mixture_prefers_what_covers_more_of_the_same_object() -> None:
    truth = block(7800)
    under, over = block(7020), block(8580)
    assert paid(iou, under, truth) == pytest.approx(0.900, abs=5e-4)
    assert paid(iou, over, truth) == pytest.approx(0.909, abs=5e-4)
    assert mixed(FULL, truth) < mixed(under, truth) < mixed(over, truth) < mixed(truth, truth)
    assert mixed(over, truth) - mixed(under, truth) < 0.02  # a small difference of masks is one of rewards


@pytest.mark.parametrize("truth", TRUTHS[:6])
def test_growing_a_mask_pays_up_to_the_object_and_costs_beyond(truth: np.ndarray) -> None:
    inwards, outwards = (
        [mixed(change(truth, iterations=steps), truth) for steps in (1, 2, 4)]
        for change in (binary_erosion, binary_dilation)
    )
    for path in (inwards, outwards):
        assert 2.0 > path[0] > path[1] > path[2] > 1.0


def degenerate() -> dict[str, np.ndarray]:
    centre = box(25, 25, 75, 75)
    return {"everything": FULL, "nothing": EMPTY, "centre box": centre, "border": ~box(5, 5, 95, 95)}


@pytest.mark.parametrize("name", degenerate())
def test_a_policy_that_does_not_look_earns_little(name: str) -> None:
    earned = [mixed(degenerate()[name], truth) - 1 for truth in TRUTHS]  # without the format's 1
    off = [np.roll(truth, (3, 3), (0, 1)) for truth in TRUTHS]  # looks, and is 3 pixels off
    rough = [mixed(mask, truth) - 1 for mask, truth in zip(off, TRUTHS, strict=True)]
    assert np.mean(earned) < 0.35
    assert np.mean(rough) > np.mean(earned) + 0.25
    assert all(bad < good for bad, good in zip(earned, rough, strict=True))


@pytest.mark.parametrize("truth", TRUTHS)
def test_an_empty_mask_earns_less_than_a_rough_answer_though_its_structure_is_not_zero(
    truth: np.ndarray,
) -> None:
    assert paid(structure, EMPTY, truth) > 0.3  # the S-measure alone would pay for silence
    assert mixed(EMPTY, truth) < 1.2
    assert mixed(np.roll(truth, 3, 0), truth) > 1.5


def test_the_structure_term_sees_the_truth() -> None:
    """The published code's term does not: see below."""
    mask = box(10, 10, 40, 40)
    assert paid(structure, mask, mask) != pytest.approx(paid(structure, mask, box(60, 60, 90, 90)), abs=0.1)


# --- Seg-R1's released reward, as it was measured


def published_structure(mask: np.ndarray, truth: np.ndarray) -> float:
    """Compute the part of the published reward that is called a structure measure."""
    return (paid(segment_as_published, mask, truth) - 0.7 * paid(iou, mask, truth)) / 0.3


def test_the_published_reward_pays_a_perfect_mask_by_how_small_it_is() -> None:
    truth = block(6000)
    assert published_structure(truth, truth) == pytest.approx(0.4)
    assert paid(segment_as_published, truth, truth) == pytest.approx(0.7 + 0.3 * 0.4)


def test_the_published_reward_pays_an_empty_mask() -> None:
    assert paid(segment_as_published, EMPTY, block(6000)) == pytest.approx(0.3)
    assert paid(segment_as_published, EMPTY, EMPTY) == pytest.approx(0.3)


def test_the_published_reward_of_everything_is_its_overlap_alone() -> None:
    assert paid(segment_as_published, FULL, block(6000)) == pytest.approx(0.7 * 0.6)


def test_the_published_reward_ranks_over_and_under_segmentation_the_wrong_way_round() -> None:
    truth = block(7800)
    under, over = (paid(segment_as_published, block(n), truth) for n in (7020, 8580))
    assert (under, over) == pytest.approx((0.719, 0.679), abs=5e-4)


@given(st.integers(0, 10**6))
def test_the_published_structure_never_looks_at_the_truth(seed: int) -> None:
    mask, one, other = np.random.default_rng(seed).random((3, 20, 20)) < 0.5
    assert published_structure(mask, one) == pytest.approx(published_structure(mask, other), abs=1e-9)
    assert published_structure(mask, one) == pytest.approx(1 - mask.mean(), abs=1e-9)
