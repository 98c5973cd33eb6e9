"""gIoU and cIoU under every convention, worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from segrl.data.reasoning import ReasonSeg
from segrl.metrics.parts import scores
from segrl.metrics.referring import Referring


def row(*pixels: int) -> np.ndarray:
    """Return a mask of 1 x 20 pixels with the given ones set."""
    mask = np.zeros((1, 20), bool)
    mask[0, list(pixels)] = True
    return mask


def table(family: Referring, *samples: tuple) -> dict[str, float]:
    """Return the scores of samples, each of them mask, truth and ignored pixels."""
    rows = [family.parts(m.astype(np.uint8) * 255, t, i[0] if i else None) for m, t, *i in samples]
    return {name: score.value for name, score in scores(family, rows, 0, 0).items()}


NOTHING, TWO, FOUR, OTHER = row(), row(0, 1), row(0, 1, 2, 3), row(8, 9, 10)


@pytest.mark.parametrize(
    ("empty", "giou", "p5"),
    [("one", (1 + 0.5 + 0) / 3, 2 / 3), ("zero", 0.5 / 3, 1 / 3), ("skip", 0.5 / 2, 1 / 2)],
)
def test_a_pair_of_empty_masks_counts_as_the_convention_says(empty, giou, p5) -> None:
    found = table(Referring(empty, "exclude", False), (NOTHING, NOTHING), (TWO, FOUR), (OTHER, NOTHING))
    assert found["giou"] == pytest.approx(giou, abs=1e-15)
    assert found["ciou"] == pytest.approx(
        2 / (4 + 3), abs=1e-15
    )  # two empty masks add nothing; a false mask adds all its pixels
    assert found["p@.5"] == pytest.approx(p5, abs=1e-15)
    assert "n_acc" not in found and "t_acc" not in found


@pytest.mark.parametrize(
    ("ignore", "both", "either"), [("exclude", 2, 5), ("background", 2, 8), ("target", 5, 10)]
)
def test_ignored_pixels_count_as_the_convention_says(ignore, both, either) -> None:
    # Truth 0-3, mask 0, 1, 4 and 10-12; of 10-14, which are ignored, the mask has three.
    mask, truth, open_ = row(0, 1, 4, 10, 11, 12), FOUR, row(10, 11, 12, 13, 14)
    found = table(Referring("one", ignore, False), (mask, truth, open_))
    assert found["giou"] == found["ciou"] == both / either
    plain = table(Referring("one", ignore, False), (mask, truth))
    assert plain["ciou"] == 2 / 8  # without ignored pixels all conventions agree


def test_a_mask_within_excluded_pixels_counts_as_empty() -> None:
    sample = (row(10, 11), NOTHING, row(10, 11, 12))
    assert table(Referring("one", "exclude", False), sample)["giou"] == 1.0
    assert table(Referring("one", "background", False), sample)["giou"] == 0.0
    assert table(Referring("one", "target", False), sample)["giou"] == 2 / 3
    assert math.isnan(table(Referring("skip", "exclude", False), sample)["giou"])


def test_grefcoco_by_relas_rules() -> None:
    found = table(
        Referring("one", "exclude", True),
        (NOTHING, FOUR),  # missed: no intersection, the truth in the union
        (NOTHING, NOTHING),  # rightly empty: 1, and nothing to cIoU
        (OTHER, NOTHING),  # wrongly drawn: 0, the mask in the union
        (FOUR, FOUR),
        (row(0, 1, 2), FOUR),
    )
    assert found["giou"] == pytest.approx((0 + 1 + 0 + 1 + 0.75) / 5, abs=1e-15)
    assert found["ciou"] == pytest.approx((0 + 4 + 3) / (4 + 3 + 4 + 4), abs=1e-15)
    assert (found["n_acc"], found["t_acc"]) == pytest.approx((1 / 2, 2 / 3), abs=1e-15)
    assert (found["p@.7"], found["p@.8"]) == pytest.approx(
        (2 / 3, 1 / 3), abs=1e-15
    )  # of the three that have a target
    assert table(Referring("one", "exclude", False), (NOTHING, FOUR), (NOTHING, NOTHING))["p@.5"] == 1 / 2


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
def test_precision_is_of_what_reaches_the_threshold(tenths) -> None:
    whole = row(*range(10))
    at, below = row(*range(tenths)), row(*range(tenths - 1))
    found = table(Referring("one", "exclude", False), (at, whole), (below, whole))
    assert found[f"p@.{tenths}"] == 1 / 2
    assert list(found) == ["giou", "ciou", "p@.5", "p@.6", "p@.7", "p@.8", "p@.9"]


def test_grey_from_128_up_is_the_mask() -> None:
    grey = np.array([[127, 128, 255, 0]], np.uint8)
    parts = Referring("one", "exclude", False).parts(grey, np.ones((1, 4), bool), None)
    assert (parts["intersection"], parts["union"]) == (2, 4)


@pytest.mark.parametrize(("key", "given"), [("empty", ("two", "exclude")), ("ignore", ("one", "drop"))])
def test_a_convention_of_another_name_is_refused(key, given) -> None:
    with pytest.raises(ValueError, match=f"scores.{key}: must be .*; got {given[key == 'ignore']}"):
        Referring(*given, False)


def test_the_description_of_the_convention_names_both_choices() -> None:
    assert "zero" in Referring("zero", "target", False).convention
    assert "target" in Referring("zero", "target", False).convention


def test_reasonseg_under_each_convention(realdata: Path) -> None:
    """The areas come from LISA's script. One answer is the truth, the other the truth with all ignored
    pixels.
    """
    areas = json.loads((realdata / "reasonseg_style/expected_mask_areas_lisa.json").read_text())
    samples = ReasonSeg(str(realdata / "reasonseg_style"), "val", False, None)
    samples = [samples[i] for i in range(len(samples))]
    target = np.array([areas[s.id]["target_px"] for s in samples])
    both = target + np.array([areas[s.id]["ignore_px"] for s in samples])
    assert (both > target).sum() == 3
    nothing = np.zeros(1, bool)
    for ignore, exact, generous in (
        ("exclude", 1, 1),
        ("background", 1, target / both),
        ("target", target / both, 1),
    ):
        family = Referring("one", ignore, False)
        for expected, masks in (
            (exact, [s.mask for s in samples]),
            (generous, [s.mask | (nothing if s.ignore is None else s.ignore) for s in samples]),
        ):
            found = table(family, *((m, s.mask, s.ignore) for m, s in zip(masks, samples, strict=True)))
            assert found["giou"] == pytest.approx(np.mean(expected), abs=1e-12)
            whole = 1.0 if np.ndim(expected) == 0 else target.sum() / both.sum()
            assert found["ciou"] == pytest.approx(whole, abs=1e-12)


def test_an_answer_that_could_not_be_parsed_has_not_said_that_there_is_nothing() -> None:
    family, empty = Referring("one", "exclude", True), np.zeros((1, 20), np.uint8)
    said, failed = (family.parts(empty, NOTHING, None, faulty) for faulty in (False, True))
    found = {name: score.value for name, score in scores(family, [said, failed], 0, 0).items()}
    assert (found["giou"], found["n_acc"]) == (0.5, 0.5)
