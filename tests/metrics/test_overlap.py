from __future__ import annotations

import json
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from segrl.metrics.functional.overlap import intersection_union, iou, mean_absolute_error

EMPTY, FULL = np.zeros((40, 60), bool), np.ones((40, 60), bool)
SQUARE, SHIFTED = EMPTY.copy(), EMPTY.copy()
SQUARE[10:30, 20:40] = True
SHIFTED[12:32, 22:42] = True
PIXEL = EMPTY.copy()
PIXEL[20, 30] = True

PAIRS = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(bool, shape, elements=st.booleans(), fill=st.nothing())] * 2)
)


def test_intersection_over_union_by_hand() -> None:
    mask = np.array([[True, True, False], [True, False, False]])
    truth = np.array([[True, False, False], [True, True, False]])
    assert iou(mask, truth) == 2 / 4
    assert mean_absolute_error(mask, truth) == 2 / 6


@pytest.mark.parametrize(
    ("mask", "truth", "overlap", "error"),
    [
        (SQUARE, SQUARE, 1.0, 0.0),
        (SHIFTED, SQUARE, 324 / 476, 152 / 2400),  # 18 x 18 shared of 400 + 400 - 324
        (EMPTY, SQUARE, 0.0, 400 / 2400),
        (SQUARE, EMPTY, 0.0, 400 / 2400),
        (FULL, SQUARE, 400 / 2400, 2000 / 2400),
        (~SQUARE, SQUARE, 0.0, 1.0),
        (EMPTY, EMPTY, 1.0, 0.0),
        (FULL, EMPTY, 0.0, 1.0),
        (EMPTY, FULL, 0.0, 1.0),
        (FULL, FULL, 1.0, 0.0),
        (FULL, PIXEL, 1 / 2400, 2399 / 2400),
    ],
)
def test_a_square_of_400_in_2400_pixels(
    mask: np.ndarray, truth: np.ndarray, overlap: float, error: float
) -> None:
    assert iou(mask, truth) == overlap
    assert mean_absolute_error(mask, truth) == error


@given(PAIRS)
def test_iou_and_mean_absolute_error_agree_with_a_count_over_sets_of_pixels(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    mask, truth = pair
    a, b = ({tuple(at) for at in np.argwhere(m).tolist()} for m in pair)
    assert iou(mask, truth) == (len(a & b) / len(a | b) if a | b else 1.0)
    assert mean_absolute_error(mask, truth) == len(a ^ b) / mask.size


@given(PAIRS)
def test_iou_and_mean_absolute_error_are_symmetric(pair: tuple[np.ndarray, np.ndarray]) -> None:
    mask, truth = pair
    assert iou(mask, truth) == iou(truth, mask)
    assert mean_absolute_error(mask, truth) == mean_absolute_error(truth, mask)


@given(PAIRS)
def test_one_pixel_put_right_never_lowers_the_overlap(pair: tuple[np.ndarray, np.ndarray]) -> None:
    mask, truth = pair
    for y, x in np.argwhere(mask != truth)[:3]:
        better = mask.copy()
        better[y, x] = truth[y, x]
        assert iou(better, truth) >= iou(mask, truth)
        assert mean_absolute_error(better, truth) < mean_absolute_error(mask, truth)


def test_ignored_pixels_are_in_neither_intersection_nor_union() -> None:
    mask = np.array([[True, True, False], [True, False, False]])
    truth = np.array([[True, False, False], [True, True, False]])
    ignore = np.array([[True, False, True], [False, True, False]])
    assert intersection_union(mask, truth, None) == (2, 4)
    assert intersection_union(mask, truth, ignore) == (1, 2)
    assert intersection_union(mask, truth, np.ones_like(mask)) == (0, 0)


@given(PAIRS, st.integers(0, 10**6))
def test_values_of_ignored_pixels_change_no_count(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    mask, truth = pair
    ignore, other = np.random.default_rng(seed).random((2, *mask.shape)) < 0.4
    found = intersection_union(mask, truth, ignore)
    assert found == intersection_union(np.where(ignore, other, mask), np.where(ignore, ~other, truth), ignore)
    assert found == intersection_union(mask[~ignore][None], truth[~ignore][None], None)
    assert intersection_union(mask, truth, np.zeros_like(mask)) == intersection_union(mask, truth, None)


def test_every_real_map_overlaps_its_truth_as_published(published: dict, edges: dict) -> None:
    for group in published.values():
        counts = []
        for pair in group.pairs.values():
            counts.append(intersection_union(pair.saliency >= 128, pair.truth, None))
            assert counts[-1] == (pair.expected["bin128_inter"], pair.expected["bin128_union"])
        both, either = np.sum(counts, 0)
        assert both / either == pytest.approx(group.dataset["ciou"], abs=1e-12)
    for pair in edges.values():
        counted = intersection_union(pair.saliency >= 128, pair.truth, None)
        assert counted == (pair.expected["bin128_inter"], pair.expected["bin128_union"])


def test_the_input_masks_are_left_as_they_are() -> None:
    mask, truth = SQUARE.copy(), SHIFTED.copy()
    iou(mask, truth), mean_absolute_error(mask, truth)
    assert (mask == SQUARE).all()
    assert (truth == SHIFTED).all()


@pytest.mark.parametrize("other", [SQUARE[:, :-1], SQUARE.astype(np.uint8), SQUARE[None]])
def test_another_size_or_type_is_refused(other: np.ndarray) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        iou(other, SQUARE)
    with pytest.raises(jaxtyping.TypeCheckError):
        mean_absolute_error(SQUARE, other)


def test_eighty_photographs_score_as_pysodmetrics_says(realdata: Path) -> None:
    published = json.loads((realdata / "pysod_expected.json").read_text())["sets"][
        "sod80/PiCANet_binarised128"
    ]
    assert len(published["per_image"]) == published["n"] == 80
    overlaps = []
    for name, expected in published["per_image"].items():
        truth = (
            np.asarray(Image.open(realdata / "saliency_maps" / "masks" / f"{name}.png").convert("L")) > 128
        )
        mask = (
            np.asarray(
                Image.open(realdata / "saliency_maps" / "preds" / "PiCANet" / f"{name}.png").convert("L")
            )
            >= 128
        )
        overlaps.append(iou(mask, truth))
        assert overlaps[-1] == pytest.approx(expected["bin128_iou"], abs=1e-12)
        assert mean_absolute_error(mask, truth) == pytest.approx(expected["mae"], abs=1e-12)
    assert np.mean(overlaps) == pytest.approx(published["dataset"]["giou_empty_is_1"], abs=1e-12)
