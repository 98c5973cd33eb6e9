from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import convolve, distance_transform_edt

from segrl.metrics.functional.weighted import weighted_f

EPS = np.spacing(1)


def published_definition(saliency: np.ndarray, truth: np.ndarray) -> float:
    """Compute Margolin's code on whole float images.

    SciPy's distance transform finds the nearest object pixel.
    """
    if not truth.any():
        return 0.0
    grey = saliency / 255
    if grey.max() > grey.min():
        grey = (grey - grey.min()) / (grey.max() - grey.min())
    distance, (rows, columns) = distance_transform_edt(~truth, return_indices=True)
    error = np.abs(grey - truth)
    spread = error[rows, columns]
    near = np.exp(-(np.arange(-3, 4) ** 2) / 50)
    kernel = np.outer(near, near) / np.outer(near, near).sum()
    around = convolve(spread, kernel, mode="constant", cval=0)
    least = np.where(truth & (around < error), around, error)
    weighed = least * np.where(truth, 1, 2 - np.exp(np.log(0.5) / 5 * distance))
    hits = truth.sum() - weighed[truth].sum()
    recall, precision = 1 - weighed[truth].mean(), hits / (hits + weighed[~truth].sum() + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


def grey(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * np.uint8(255)


# --- by hand


def test_a_false_pixel_weighs_more_the_farther_it_lies() -> None:
    truth = np.zeros((9, 700), bool)
    truth[4, 4] = True
    for distance, weight in ((1, 2 - 0.5 ** (1 / 5)), (5, 1.5), (10, 1.75), (600, 2.0)):
        mask = truth.copy()
        mask[4, 4 + distance] = True
        precision = 1 / (1 + weight)
        assert weighted_f(grey(mask), truth) == pytest.approx(2 * precision / (1 + precision), abs=1e-12)


def test_a_missed_pixel_inside_the_object_weighs_as_much_as_the_middle_of_the_kernel() -> None:
    truth = np.zeros((30, 30), bool)
    truth[5:20, 5:20] = True
    mask = truth.copy()
    mask[12, 12] = False
    middle = (1 / np.exp(-(np.arange(-3, 4) ** 2) / 50).sum()) ** 2
    recall = 1 - middle / 225
    assert weighted_f(grey(mask), truth) == pytest.approx(2 * recall / (recall + 1), abs=1e-12)


def test_a_perfect_map_scores_one_and_a_map_that_finds_nothing_zero() -> None:
    truth = np.zeros((30, 40), bool)
    truth[8:20, 10:30] = True
    assert weighted_f(grey(truth), truth) == pytest.approx(1.0, abs=1e-12)
    assert weighted_f(np.zeros((30, 40), np.uint8), truth) == pytest.approx(0.0, abs=1e-12)
    assert weighted_f(grey(~truth), truth) == pytest.approx(0.0, abs=1e-12)
    assert weighted_f(grey(truth), np.zeros_like(truth)) == 0.0


# --- pysodmetrics and MATLAB


def test_small_maps_score_as_pysodmetrics_says(small: dict) -> None:
    for name, pair in small.items():
        assert weighted_f(pair.saliency, pair.truth) == pytest.approx(pair.expected["wfm"], abs=1e-9), name


def test_every_edge_case_scores_as_pysodmetrics_says(edges: dict) -> None:
    for name, pair in edges.items():
        assert weighted_f(pair.saliency, pair.truth) == pytest.approx(pair.expected["wfm"], abs=1e-9), name


def test_every_real_map_scores_as_pysodmetrics_says(published: dict) -> None:
    for name, group in published.items():
        found = [weighted_f(pair.saliency, pair.truth) for pair in group.pairs.values()]
        expected = [pair.expected["wfm"] for pair in group.pairs.values()]
        assert found == pytest.approx(expected, abs=1e-9), name
        assert np.mean(found) == pytest.approx(group.dataset["wfm"], abs=1e-9), name


def test_matlab_agrees_on_three_camouflaged_fish(published: dict, realdata: Path) -> None:
    matlab = json.loads((realdata / "cod10k_maskpred" / "matlab_oracle.json").read_text())
    found = [weighted_f(pair.saliency, pair.truth) for pair in published["cod10k3/SINet"].pairs.values()]
    assert np.mean(found) == pytest.approx(matlab["wFm"], abs=1e-9)


# --- the published definition, where nearest pixels tie


@given(
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=18).flatmap(
        lambda shape: st.tuples(
            hnp.arrays(np.uint8, shape, elements=st.integers(0, 255), fill=st.nothing()),
            hnp.arrays(bool, shape, elements=st.booleans(), fill=st.nothing()),
        )
    )
)
def test_random_maps_score_as_the_published_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert weighted_f(*pair) == pytest.approx(published_definition(*pair), abs=1e-12)


@given(st.integers(0, 10**6), st.sampled_from([0.003, 0.02, 0.1, 0.5, 0.95]), st.booleans())
def test_scattered_objects_score_as_the_published_definition(seed: int, share: float, binary: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random((41, 37)) < share  # many pixels have several nearest
    saliency = rng.integers(0, 256, truth.shape).astype(np.uint8)
    if binary:
        saliency = grey(saliency > rng.integers(0, 255))
    assert weighted_f(saliency, truth) == pytest.approx(published_definition(saliency, truth), abs=1e-12)


def test_of_two_equally_near_object_pixels_the_same_one_counts_as_in_the_published_code() -> None:
    # Of two object pixels at equal distance the left one, which has no error, counts as the nearest. In the
    # mirrored map it is the one with the error, so the score differs.
    truth = np.zeros((9, 9), bool)
    truth[4, 3] = truth[4, 5] = True
    saliency = grey(truth)
    saliency[4, 5] = 60
    mirrored = np.ascontiguousarray(saliency[:, ::-1])
    for map_ in (saliency, mirrored):
        assert weighted_f(map_, truth) == pytest.approx(published_definition(map_, truth), abs=1e-12)
    assert abs(weighted_f(saliency, truth) - weighted_f(mirrored, truth)) > 1e-3


@given(st.integers(0, 10**6))
def test_far_errors_score_as_the_published_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, mask = np.zeros((2, 24, 640), bool)
    for canvas in (truth, mask):
        for _ in range(int(rng.integers(1, 4))):
            y, x = rng.integers(0, 20), rng.integers(0, 630)
            canvas[y : y + 5, x : x + 9] = True
    assert weighted_f(grey(mask), truth) == pytest.approx(published_definition(grey(mask), truth), abs=1e-12)


def test_strided_arrays_score_as_their_contiguous_copies_and_are_not_changed() -> None:
    rng = np.random.default_rng(3)
    saliency, truth = rng.integers(0, 256, (50, 40)).astype(np.uint8), rng.random((50, 40)) < 0.2
    before = saliency.copy(), truth.copy()
    for view in (np.s_[::-1, ::-1], np.s_[::2, 1::3], np.s_[5:, :30]):
        packed = [np.ascontiguousarray(array[view]) for array in (saliency, truth)]
        assert weighted_f(saliency[view], truth[view]) == weighted_f(*packed)
    assert weighted_f(saliency.T, truth.T) == weighted_f(
        np.ascontiguousarray(saliency.T), np.ascontiguousarray(truth.T)
    )
    assert (saliency == before[0]).all()
    assert (truth == before[1]).all()
