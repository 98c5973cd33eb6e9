from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segrl.metrics.functional import overlap
from segrl.metrics.functional import structure as of_masks
from segrl.metrics.functional.tally import (
    Tally,
    above_half,
    e_measure,
    f_measure,
    mean_absolute_error,
    structure,
    tally,
)

EPS = np.spacing(1)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
VALUES = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 254, 255]))
PAIRS = SHAPES.flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.uint8, shape, elements=VALUES, fill=st.nothing()),
        hnp.arrays(bool, shape, elements=st.booleans(), fill=st.nothing()),
    )
)


def scores(t: Tally) -> dict[str, float]:
    """Return the scores under their names in pysod_expected.json."""
    (adaptive_e, e), (adaptive_f, f) = e_measure(t), f_measure(t)
    return {
        "mae": mean_absolute_error(t), "sm": structure(t),
        "adp_e": adaptive_e, "mean_e": e.mean(), "max_e": e.max(),
        "adp_f": adaptive_f, "mean_f": f.mean(), "max_f": f.max(),
    }  # fmt: skip


# --- by hand

FOUR = np.array([[10, 60], [110, 210]], np.uint8)  # stretched: 0, 1/4, 1/2, 1
LOWER = np.array([[False, False], [True, True]])


def test_a_map_is_counted_by_quadrant_by_side_and_by_value() -> None:
    truth = np.zeros((4, 5), bool)
    truth[0, :3] = True  # centroid row 0, column 1: cuts 1 and 2
    saliency = np.arange(20, dtype=np.uint8).reshape(4, 5)
    counts = tally(saliency, truth).counts
    assert counts.sum() == 20
    found = [[np.flatnonzero(side).tolist() for side in quadrant] for quadrant in counts]
    assert found == [
        [[], [0, 1]],
        [[3, 4], [2]],
        [[5, 6, 10, 11, 15, 16], []],
        [[7, 8, 9, 12, 13, 14, 17, 18, 19], []],
    ]


def test_mean_absolute_error_by_hand() -> None:
    assert mean_absolute_error(tally(FOUR, LOWER)) == (0 + 1 / 4 + 1 / 2 + 0) / 4


def test_f_measure_by_hand() -> None:
    # mean 7/16, so the adaptive threshold is 7/8: one hit of two, nothing wrong: precision 1, recall 1/2
    adaptive, curve = f_measure(tally(FOUR, LOWER))
    assert adaptive == pytest.approx(1.3 * 0.5 / (0.3 + 0.5), abs=1e-15)
    # from 255 down: 1 pixel until 1/2 (127.5), 2 until 1/4 (63.75), 3 until 0, then all
    assert curve[:128] == pytest.approx(adaptive)
    assert curve[128:192] == pytest.approx(1.0)
    assert curve[192:255] == pytest.approx(1.3 * 2 / 3 / (0.3 * 2 / 3 + 1))
    assert curve[255] == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1))
    assert f_measure(tally(FOUR, LOWER), beta2=1.0)[0] == pytest.approx(2 / 3)


def test_e_measure_by_hand() -> None:
    # One hit: map mean 1/4, truth mean 1/2. The hit gives 2 * 3/8 / (9/16 + 1/4) = 12/13, the missed pixel
    # -4/5, right background 2 * 1/8 / (1/16 + 1/4) = 4/5.
    adaptive, curve = e_measure(tally(FOUR, LOWER))
    hit, missed, left = (((x + 1) ** 2 / 4) for x in (12 / 13, -4 / 5, 4 / 5))
    assert adaptive == pytest.approx((hit + missed + 2 * left) / 3, abs=1e-12)
    assert curve[0] == adaptive
    assert curve[128] == pytest.approx(4 / 3, abs=1e-12)  # perfect, of 4 pixels: n / (n - 1)


def test_a_value_equal_to_the_adaptive_threshold_is_foreground() -> None:
    # Levels 0, 1/2, 1/2, 1/2, 1, 0, 0, 0 have the mean 5/16; twice that is above 1/2. With two more zeros it
    # is exactly 1/2.
    saliency = np.array([[0, 50, 50, 50, 100, 0, 0, 0, 0, 0]], np.uint8)
    truth = saliency >= 50
    assert f_measure(tally(saliency, truth))[0] == 1.0
    assert f_measure(tally(saliency[:, :8], truth[:, :8]))[0] < 1.0


def test_above_half_is_taken_after_stretching_the_map() -> None:
    assert above_half(FOUR).tolist() == [[False, False], [False, True]]
    assert above_half(np.array([[0, 127, 128]], np.uint8)).tolist() == [[False, True, True]]
    assert above_half(np.array([[0, 127, 128, 255]], np.uint8)).tolist() == [[False, False, True, True]]
    assert above_half(np.array([[127, 127]], np.uint8)).tolist() == [[False, False]]
    assert above_half(np.array([[128, 128]], np.uint8)).tolist() == [[True, True]]


def test_counts_beyond_what_a_float32_holds_are_exact() -> None:
    saliency, truth = np.zeros((4097, 4097), np.uint8), np.zeros((4097, 4097), bool)
    truth[-1, -1], saliency[7, 7] = True, 9  # the centroid's quadrant is the whole image
    counts = tally(saliency, truth).counts
    assert counts[0, 0, 0] == 4097**2 - 2
    assert counts[0, 0, 9] == counts[0, 1, 0] == 1
    assert counts.sum() == 4097**2


# --- pysodmetrics


def test_small_maps_score_as_pysodmetrics_says(small: dict, small_maps: ModuleType) -> None:
    for name, pair in small.items():
        t, expected = tally(pair.saliency, pair.truth), pair.expected
        assert mean_absolute_error(t) == pytest.approx(expected["mae"], abs=1e-9), name
        for kind, (adaptive, curve) in (("em", e_measure(t)), ("fm", f_measure(t))):
            assert adaptive == pytest.approx(expected[kind]["adaptive"], abs=1e-9), name
            assert curve[list(small_maps.THRESHOLDS)] == pytest.approx(expected[kind]["curve"], abs=1e-9), (
                name
            )
            assert curve.mean() == pytest.approx(expected[kind]["mean"], abs=1e-9), name
            assert curve.max() == pytest.approx(expected[kind]["max"], abs=1e-9), name
        if expected["sm"] is not None and name != "upper_constant_77":
            assert structure(t) == pytest.approx(expected["sm"], abs=1e-9), name
    unscored = {name for name, pair in small.items() if pair.expected["sm"] is None}
    assert unscored == {"row_of_9", "two_by_two", "last_row", "last_column", "last_pixel"}
    assert all(0 < structure(tally(small[name].saliency, small[name].truth)) < 1 for name in unscored)


def test_a_quadrant_where_both_maps_are_constant_is_alike_whatever_rounding_says(small: dict) -> None:
    # Rows 1 and 2, columns 1 to 3 of 24 x 30: cuts 3 and 3, so that the third quadrant, 21 x 3, has neither
    # object nor contrast. It should count by its share of the area, but the mean of 63 times 77/255 is not
    # quite 77/255 there.
    pair = small["upper_constant_77"]
    ours = structure(tally(pair.saliency, pair.truth))
    assert ours - pair.expected["sm"] == pytest.approx(0.5 * 63 / 720, abs=1e-9)


def test_every_edge_case_scores_as_pysodmetrics_says(edges: dict) -> None:
    assert len(edges) == 25
    finite = []
    for name, pair in edges.items():
        found = scores(tally(pair.saliency, pair.truth))
        for kind, value in found.items():
            if pair.expected[kind] == "nan":
                finite.append((name, kind))
                assert value == pytest.approx(1.0, abs=1e-6)  # the centroid at the edge, a perfect map
            else:
                assert value == pytest.approx(pair.expected[kind], abs=1e-9), (name, kind)
    assert finite == [("lastcol_gt", "sm"), ("lastrow_gt", "sm"), ("corner_gt", "sm")]


def test_every_real_map_scores_as_pysodmetrics_says(published: dict) -> None:
    for name, group in published.items():
        found, curves = [], {"e": [], "f": []}
        for stem, pair in group.pairs.items():
            t = tally(pair.saliency, pair.truth)
            found.append(scores(t))
            curves["e"].append(e_measure(t)[1])
            curves["f"].append(f_measure(t)[1])
            for kind, value in found[-1].items():
                assert value == pytest.approx(pair.expected[kind], abs=1e-9), (name, stem, kind)
        for kind in ("mae", "sm", "adp_e", "adp_f"):
            assert np.mean([s[kind] for s in found]) == pytest.approx(group.dataset[kind], abs=1e-9), name
        for kind, several in curves.items():
            mean = np.mean(several, 0)
            assert mean == pytest.approx(group.curves[kind], abs=1e-9), name
            assert mean.max() == pytest.approx(group.dataset[f"max_{kind}"], abs=1e-9), name
            assert mean.mean() == pytest.approx(group.dataset[f"mean_{kind}"], abs=1e-9), name


def test_matlab_agrees_on_three_camouflaged_fish(published: dict, realdata: Path) -> None:
    matlab = json.loads((realdata / "cod10k_maskpred" / "matlab_oracle.json").read_text())
    tallies = [tally(pair.saliency, pair.truth) for pair in published["cod10k3/SINet"].pairs.values()]
    e, f = (np.mean([score(t)[1] for t in tallies], 0) for score in (e_measure, f_measure))
    adaptive = [np.mean([score(t)[0] for t in tallies]) for score in (e_measure, f_measure)]
    assert np.mean([structure(t) for t in tallies]) == pytest.approx(matlab["Sm"], abs=1e-12)
    assert np.mean([mean_absolute_error(t) for t in tallies]) == pytest.approx(matlab["mae"], abs=1e-11)
    assert adaptive == pytest.approx([matlab["adpEm"], matlab["adpFm"]], abs=1e-9)
    assert e.max() == pytest.approx(matlab["maxEm"], abs=1e-9)
    # MATLAB bins by rounding and counts thresholds up, so its curves are shifted by one
    assert e.mean() == pytest.approx(matlab["meanEm"], abs=2e-5)
    assert f.max() == pytest.approx(matlab["maxFm"], abs=2e-5)
    assert f.mean() == pytest.approx(matlab["meanFm"], abs=2e-6)


# --- invariants


def stretched(saliency: np.ndarray) -> np.ndarray:
    values = saliency / 255
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else values


@given(PAIRS)
def test_curves_are_those_of_a_loop_over_thresholds(pair: tuple[np.ndarray, np.ndarray]) -> None:
    saliency, truth = pair
    grey = (stretched(saliency) * 255).astype(np.uint8)
    e, f = e_measure(tally(saliency, truth))[1], f_measure(tally(saliency, truth))[1]
    for place in (0, 1, 100, 128, 254, 255):
        mask = grey >= 255 - place
        assert e[place] == pytest.approx(of_e(mask, truth), rel=1e-9)
        assert f[place] == pytest.approx(of_f(mask, truth), abs=1e-9)


def of_e(mask: np.ndarray, truth: np.ndarray) -> float:
    """Compute the E-measure pixel by pixel."""
    if not truth.any():
        aligned = 1.0 - mask
    elif truth.all():
        aligned = mask.astype(float)
    else:
        a, b = mask - mask.mean(), truth - truth.mean()
        aligned = (2 * a * b / (a * a + b * b + EPS) + 1) ** 2 / 4
    return aligned.sum() / (truth.size - 1 + EPS)


def of_f(mask: np.ndarray, truth: np.ndarray) -> float:
    hits = (mask & truth).sum()
    return 1.3 * hits / (0.3 * truth.sum() + mask.sum()) if hits else 0.0


@given(PAIRS)
def test_scores_stay_in_their_ranges(pair: tuple[np.ndarray, np.ndarray]) -> None:
    t = tally(*pair)
    most, pixels = 1 + 1e-12, pair[1].size
    assert 0 <= mean_absolute_error(t) <= 1
    assert 0 <= structure(t) <= most
    bounds = ((e_measure(t), pixels / (pixels - 1 + EPS) + 1e-9), (f_measure(t), most))
    for (adaptive, curve), bound in bounds:
        assert math.isfinite(adaptive)
        assert np.isfinite(curve).all()
        assert min(adaptive, curve.min()) >= 0
        assert max(adaptive, curve.max()) <= bound


@given(PAIRS, st.randoms(use_true_random=False))
def test_error_e_measure_and_f_measure_do_not_depend_on_the_order_of_pixels(
    pair: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    order = list(range(pair[1].size))
    random.shuffle(order)
    moved = [a.ravel()[order].reshape(a.shape) for a in pair]
    one, other = tally(*pair), tally(*moved)
    assert mean_absolute_error(one) == mean_absolute_error(other)
    for score in (e_measure, f_measure):
        (adaptive, curve), (moved_adaptive, moved_curve) = score(one), score(other)
        assert adaptive == moved_adaptive
        assert (curve == moved_curve).all()


@given(PAIRS)
def test_transposing_both_maps_changes_no_score(pair: tuple[np.ndarray, np.ndarray]) -> None:
    turned = tally(pair[0].T, pair[1].T)  # neither is contiguous
    assert scores(turned) == pytest.approx(scores(tally(*pair)), abs=1e-12)


@given(PAIRS, st.integers(0, 100))
def test_brightness_and_contrast_change_nothing(pair: tuple[np.ndarray, np.ndarray], low: int) -> None:
    saliency, truth = pair[0] // 4, pair[1]  # 0 to 63
    if saliency.min() == saliency.max():
        return
    one, other = scores(tally(saliency, truth)), scores(tally(low + 2 * saliency, truth))
    for name in ("mae", "sm", "adp_e", "adp_f"):
        assert one[name] == pytest.approx(other[name], rel=1e-12)


@given(PAIRS)
def test_a_binary_map_scores_as_its_mask(pair: tuple[np.ndarray, np.ndarray]) -> None:
    mask, truth = pair[0] > 127, pair[1]
    t = tally(mask.astype(np.uint8) * np.uint8(255), truth)
    assert structure(t) == pytest.approx(of_masks.structure(mask, truth), abs=1e-12)
    assert mean_absolute_error(t) == pytest.approx(overlap.mean_absolute_error(mask, truth), abs=1e-15)
    assert f_measure(t)[1][:255] == pytest.approx(of_f(mask, truth), abs=1e-12)
    if mask.any():  # an empty mask counts as all object at the adaptive threshold
        assert f_measure(t)[0] == f_measure(t)[1][0]
        assert e_measure(t)[0] == e_measure(t)[1][0]
