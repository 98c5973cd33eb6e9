from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from segrl.metrics.functional.structure import quadrants_of, structure
from segrl.metrics.functional.tally import structure as structure_of_tally
from segrl.metrics.functional.tally import tally

EPS = np.spacing(1)

# --- an oracle: the grey-map formula in float64, pixel maps and all


def oracle(map_: np.ndarray, truth: np.ndarray) -> float:
    """Compute the S-measure of a grey map in [0, 1]; quadrants without a pixel contribute nothing."""
    share = truth.astype(np.float64).mean()
    if share == 0:
        return 1 - map_.mean()
    if share == 1:
        return map_.mean()
    of_object = share * evenness(map_[truth]) + (1 - share) * evenness((1 - map_)[~truth])
    return max(0.0, 0.5 * of_object + 0.5 * of_region(map_, truth.astype(np.float64)))


def evenness(values: np.ndarray) -> float:
    mean, deviation = values.mean(), values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + EPS)


def of_region(map_: np.ndarray, truth: np.ndarray) -> float:
    cut_y, cut_x = (np.round(np.argwhere(truth).mean(0)).astype(int) + 1).tolist()
    total = 0.0
    for corner in (
        np.s_[:cut_y, :cut_x],
        np.s_[:cut_y, cut_x:],
        np.s_[cut_y:, :cut_x],
        np.s_[cut_y:, cut_x:],
    ):
        if truth[corner].size:
            total += truth[corner].size / truth.size * ssim(map_[corner], truth[corner])
    return total


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    x, y, n = a.mean(), b.mean(), a.size
    spread_a = ((a - x) ** 2).sum() / (n - 1 + EPS)
    spread_b = ((b - y) ** 2).sum() / (n - 1 + EPS)
    together = ((a - x) * (b - y)).sum() / (n - 1 + EPS)
    alpha, beta = 4 * x * y * together, (x**2 + y**2) * (spread_a + spread_b)
    if alpha != 0:
        return alpha / (beta + EPS)
    return 1.0 if beta == 0 else 0.0


def stretched(grey: np.ndarray) -> np.ndarray:
    """Prepare an 8-bit map as pysodmetrics does.

    Its smallest value becomes 0 and its largest 1, unless it is constant.
    """
    values = grey / 255
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values


def read(path: Path) -> np.ndarray:
    """Read an 8-bit grey map; of a 16-bit one the upper byte, as OpenCV reads it."""
    image = Image.open(path)
    return (
        (np.asarray(image) >> 8).astype(np.uint8) if image.mode == "I;16" else np.asarray(image.convert("L"))
    )


# --- published values, one by one

SHAPE = (40, 60)


def rectangle(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[rows, columns] = True
    return mask


EMPTY, FULL = np.zeros(SHAPE, bool), np.ones(SHAPE, bool)
SQUARE, SHIFTED = rectangle(np.s_[10:30], np.s_[20:40]), rectangle(np.s_[12:32], np.s_[22:42])
PIXEL = rectangle(np.s_[20:21], np.s_[30:31])
CORNER = rectangle(np.s_[:1], np.s_[:1])

# pysodmetrics 1.6.2, 40 x 60
EDGES = {
    "perfect_square": (SQUARE, SQUARE, 0.9999999999999925),
    "shifted_square": (SHIFTED, SQUARE, 0.8195036795799198),
    "empty_pred_square_gt": (EMPTY, SQUARE, 0.4166666666666667),
    "full_pred_square_gt": (FULL, SQUARE, 0.08333333333333333),
    "empty_pred_empty_gt": (EMPTY, EMPTY, 1.0),
    "full_pred_empty_gt": (FULL, EMPTY, 0.0),
    "square_pred_empty_gt": (SQUARE, EMPTY, 0.8333333333333334),
    "empty_pred_full_gt": (EMPTY, FULL, 0.0),
    "full_pred_full_gt": (FULL, FULL, 1.0),
    "square_pred_full_gt": (SQUARE, FULL, 0.16666666666666666),
    "inverse": (~SQUARE, SQUARE, 0.0),
    "one_pixel_gt_perfect": (PIXEL, PIXEL, 0.9999999979228735),
    "one_pixel_gt_full_pred": (FULL, PIXEL, 0.3645833333333333),
    "corner00_gt": (CORNER, CORNER, 1.0),
}


@pytest.mark.parametrize("name", EDGES)
def test_an_edge_case_scores_as_pysodmetrics_says(name: str) -> None:
    mask, truth, published = EDGES[name]
    assert structure(mask, truth) == pytest.approx(published, abs=1e-9)
    assert oracle(mask.astype(float), truth) == pytest.approx(published, abs=1e-9)


def test_the_published_edge_cases_are_still_those(realdata: Path) -> None:
    cases = json.loads((realdata / "pysod_expected.json").read_text())["edge_cases_40x60"]["cases"]
    assert {name: cases[name]["sm"] for name in EDGES} == {
        name: value for name, (_, _, value) in EDGES.items()
    }


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_blends_the_object_and_the_region_term(alpha: float) -> None:
    of_object, of_region_ = structure(SHIFTED, SQUARE, alpha=1.0), structure(SHIFTED, SQUARE, alpha=0.0)
    assert of_region_ == pytest.approx(of_region(SHIFTED.astype(float), SQUARE.astype(float)), abs=1e-9)
    assert structure(SHIFTED, SQUARE, alpha) == pytest.approx(
        alpha * of_object + (1 - alpha) * of_region_, abs=1e-12
    )
    assert of_object != pytest.approx(of_region_, abs=1e-3)


def test_the_object_term_by_hand() -> None:
    # The truth has 4 pixels, 3 are found: m = 3/4, deviation sqrt(4 * 3/16 / 3) = 1/2. None of the 4 pixels
    # outside is marked: 1.
    truth = np.array([[True] * 4, [False] * 4])
    mask = np.array([[True, True, True, False], [False] * 4])
    assert structure(mask, truth, alpha=1.0) == pytest.approx(
        0.5 * (1.5 / (9 / 16 + 1 + 0.5)) + 0.5, abs=1e-12
    )


def test_the_region_term_by_hand() -> None:
    # Columns 0 and 1 of 4 hold the truth: mean row 0.5, rounded to even 0, cut 1; mean column 0.5, cut 1.
    # The mask misses column 1: its two quadrants have y = 1/3 and an empty prediction, 0. The other quadrants
    # are constant, 1.
    truth = np.array([[True, True, False, False]] * 2)
    mask = np.array([[True, False, False, False]] * 2)
    assert structure(mask, truth, alpha=0.0) == pytest.approx(2 / 8, abs=1e-12)


# --- the centroid at the border: NaN in pysodmetrics, finite here


@pytest.mark.parametrize(
    "truth",
    [
        rectangle(np.s_[-1:], np.s_[:]),
        rectangle(np.s_[:], np.s_[-1:]),
        rectangle(np.s_[-1:], np.s_[-1:]),
        rectangle(np.s_[-1:], np.s_[10:20]),
        rectangle(np.s_[5:9], np.s_[-1:]),
    ],
)
def test_a_perfect_mask_in_the_last_row_or_column_scores_one(truth: np.ndarray) -> None:
    assert structure(truth, truth) == pytest.approx(1.0, abs=1e-6)
    for mask in (EMPTY, FULL, ~truth, SQUARE):
        assert math.isfinite(structure(mask, truth))
        assert structure(mask, truth) < 0.6


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (1, 2)])
def test_the_smallest_images_score_one_when_perfect(shape: tuple[int, int]) -> None:
    for seed in range(2 ** min(4, shape[0] * shape[1])):
        truth = np.array([seed >> i & 1 for i in range(shape[0] * shape[1])], bool).reshape(shape)
        assert structure(truth, truth) == pytest.approx(1.0, abs=1e-9)


# --- against the oracle

SETS = {
    "sod80/PiCANet": ("saliency_maps/preds/PiCANet", "saliency_maps/masks"),
    "sod80/DSS": ("saliency_maps/preds/DSS", "saliency_maps/masks"),
    "sod80/Amulet": ("saliency_maps/preds/Amulet", "saliency_maps/masks"),
    "cod10k3/SINet": ("cod10k_maskpred/preds_SINet", "cod10k_maskpred/masks"),
    "pysod_test_data": ("pysod_test_data/preds", "pysod_test_data/masks"),
    "smeasure_demo": ("smeasure_demo/demo/FG", "smeasure_demo/demo/GT"),
}


@pytest.mark.parametrize("name", SETS)
def test_the_oracle_is_pysodmetrics_on_grey_maps_and_ours_is_the_oracle_on_binary_ones(
    realdata: Path, name: str
) -> None:
    published = json.loads((realdata / "pysod_expected.json").read_text())["sets"][name]
    maps, truths = (realdata / folder for folder in SETS[name])
    scores = []
    for stem, expected in published["per_image"].items():
        of_truth = stem.split("_")[0] if name == "smeasure_demo" else stem
        grey, truth = read(maps / f"{stem}.png"), read(truths / f"{of_truth}.png") > 128
        scores.append(oracle(stretched(grey), truth))
        assert scores[-1] == pytest.approx(expected["sm"], abs=1e-9)
        for threshold in (64, 128):
            mask = grey >= threshold
            assert structure(mask, truth) == pytest.approx(oracle(mask.astype(float), truth), abs=1e-9)
    assert len(scores) == published["n"]
    assert np.mean(scores) == pytest.approx(published["dataset"]["sm"], abs=1e-9)


def test_eighty_binary_masks_score_as_pysodmetrics_says(realdata: Path) -> None:
    published = json.loads((realdata / "pysod_expected.json").read_text())["sets"][
        "sod80/PiCANet_binarised128"
    ]
    scores = []
    for stem, expected in published["per_image"].items():
        mask = read(realdata / "saliency_maps" / "preds" / "PiCANet" / f"{stem}.png") >= 128
        scores.append(structure(mask, read(realdata / "saliency_maps" / "masks" / f"{stem}.png") > 128))
        assert scores[-1] == pytest.approx(expected["sm"], abs=1e-9)
    assert len(scores) == 80
    assert np.mean(scores) == pytest.approx(0.7797005918484372, abs=1e-9)


PAIRS = hnp.array_shapes(min_dims=2, max_dims=2, max_side=14).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(bool, shape, elements=st.booleans(), fill=st.nothing())] * 2)
)


@given(PAIRS)
def test_random_masks_score_as_the_oracle_says(pair: tuple[np.ndarray, np.ndarray]) -> None:
    mask, truth = pair
    assert structure(mask, truth) == pytest.approx(oracle(mask.astype(float), truth), abs=1e-9)


@given(st.integers(0, 10**6), st.floats(0.003, 0.997), st.floats(0.003, 0.997))
def test_sparse_and_dense_masks_score_as_the_oracle_says(
    seed: int, density: float, truth_density: float
) -> None:
    noise = np.random.default_rng(seed).random((2, 33, 47))
    mask, truth = noise[0] < density, noise[1] < truth_density
    assert structure(mask, truth) == pytest.approx(oracle(mask.astype(float), truth), abs=1e-9)


@given(st.integers(0, 10**6))
def test_overlapping_discs_score_as_the_oracle_says(seed: int) -> None:
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:40, :60]
    (cy, cx), radius = rng.uniform((0, 0), SHAPE), rng.uniform(2, 25)
    truth = np.hypot(y - cy, x - cx) < radius
    mask = np.hypot(y - cy - rng.normal(0, 3), x - cx - rng.normal(0, 3)) < radius * rng.uniform(0.6, 1.5)
    assert structure(mask, truth) == pytest.approx(oracle(mask.astype(float), truth), abs=1e-9)


@given(PAIRS)
def test_the_score_lies_between_zero_and_one_and_only_the_truth_earns_one(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    mask, truth = pair
    assert -1e-12 <= structure(mask, truth) <= 1 + 1e-12
    assert structure(truth, truth) == pytest.approx(1.0, abs=1e-9)
    if (mask != truth).any():
        assert structure(mask, truth) < 1 - 1e-6


# --- grey maps: the same arithmetic


@given(PAIRS, st.integers(0, 10**6))
def test_random_grey_maps_score_as_the_oracle_says(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    truth = pair[1]
    saliency = np.random.default_rng(seed).integers(0, 256, truth.shape).astype(np.uint8)
    for map_ in (saliency, saliency // 64 * 80):
        if (map_ == map_[0, 0]).all() and map_[0, 0] not in (0, 255):
            continue  # the oracle's mean of a constant is rounded
        found = structure_of_tally(tally(map_, truth))
        assert found == pytest.approx(oracle(stretched(map_), truth), abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_blends_the_terms_of_a_grey_map(alpha: float) -> None:
    soft = (SHIFTED * 150 + SQUARE * 100).astype(np.uint8)
    t = tally(soft, SQUARE)
    blended = alpha * structure_of_tally(t, 1.0) + (1 - alpha) * structure_of_tally(t, 0.0)
    assert structure_of_tally(t, alpha) == pytest.approx(blended, abs=1e-12)
    assert structure_of_tally(t, 0.0) == pytest.approx(
        of_region(stretched(soft), SQUARE.astype(float)), abs=1e-9
    )


def test_quadrants_meet_behind_the_centroid() -> None:
    # rows 10 to 29: mean 19.5, rounded to even 20; columns 20 to 39: 29.5, 30
    assert quadrants_of(SQUARE) == [np.s_[:21, :31], np.s_[:21, 31:], np.s_[21:, :31], np.s_[21:, 31:]]
    assert quadrants_of(EMPTY)[0] == np.s_[:40, :60]


def test_strided_masks_score_as_their_contiguous_copies() -> None:
    for turn in (np.s_[::-1, ::-1], np.s_[::2, 1::3]):
        packed = np.ascontiguousarray(SHIFTED[turn]), np.ascontiguousarray(SQUARE[turn])
        assert structure(SHIFTED[turn], SQUARE[turn]) == structure(*packed)
    assert structure(SHIFTED.T, SQUARE.T) == pytest.approx(structure(SHIFTED, SQUARE), abs=1e-12)
