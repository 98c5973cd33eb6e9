"""Scores of degenerate answers: the empty mask of a fault never scores as much as a right answer."""

from __future__ import annotations

import numpy as np
import pytest

from segrl.metrics.parts import scores
from segrl.metrics.referring import Referring
from segrl.metrics.saliency import METRICS, NAMES, Saliency, brief
from segrl.types import Answer, Parsed, ParseFault, Sample

SHAPE = (40, 60)
OBJECT = np.zeros(SHAPE, bool)
OBJECT[10:30, 20:44] = True
HALF = OBJECT & (np.arange(60) < 32)
WRONG = np.zeros(SHAPE, bool)
WRONG[2:8, 2:14] = True
NOTHING, EVERYTHING = np.zeros(SHAPE, bool), np.ones(SHAPE, bool)
ERRORS = ("mae", "hce", "fault_rate")  # the lower, the better
ANSWERS = {"right": None, "half": HALF, "wrong": WRONG, "all image": EVERYTHING, "fault": NOTHING}
FAMILIES = {
    "saliency": Saliency(METRICS),
    **{
        f"referring {empty} {ignore}{' no target' if absent else ''}": Referring(empty, ignore, absent)
        for empty in ("one", "zero", "skip")
        for ignore in ("exclude", "background", "target")
        for absent in (False, True)
    },
}


def valued(family, truth: np.ndarray, answer: str, ignore: np.ndarray | None = None) -> dict[str, float]:
    """Return the scores of one answer, with errors negated so that more is better.

    Scores without a denominator are left out.
    """
    mask = truth if answer == "right" else ANSWERS[answer]
    parts = family.parts(mask.astype(np.uint8) * 255, truth, ignore, answer == "fault")
    table = scores(family, [parts], 0, 0)
    return {k: -s.value if k in ERRORS else s.value for k, s in table.items() if not np.isnan(s.value)}


@pytest.mark.parametrize("name", FAMILIES)
def test_where_there_is_an_object_a_fault_is_below_any_part_of_it(name: str) -> None:
    family = FAMILIES[name]
    right, half, fault = (valued(family, OBJECT, answer) for answer in ("right", "half", "fault"))
    assert right.keys() >= fault.keys() - {"n_acc"}
    for key, value in fault.items():
        assert value <= half[key] <= right[key] + 1e-3, key
        assert value < right[key], key


@pytest.mark.parametrize("name", FAMILIES)
def test_where_there_is_nothing_a_fault_is_no_right_answer_and_no_better_than_any(name: str) -> None:
    family = FAMILIES[name]
    found = {answer: valued(family, NOTHING, answer) for answer in ANSWERS if answer != "half"}
    for key, value in found["fault"].items():
        for answer in ("right", "wrong", "all image"):
            assert value <= found[answer].get(key, np.inf) or key == "hce", (key, answer)
    if name == "saliency":  # E's adaptive threshold, weighted F and F cannot tell anything of an empty truth
        told = ("sm", "mae", "mean_e", "max_e", "iou", "hce", "biou", "mba")
    else:
        told = (*(["giou"] if family.empty == "one" else []), *(["n_acc"] if family.no_target else []))
        assert found["fault"]["giou"] == 0.0  # also where the right answer is skipped
    for key in told:
        assert found["fault"][key] < found["right"][key], key


def test_where_all_pixels_are_left_open_a_fault_is_no_right_answer() -> None:
    family = Referring("one", "exclude", False)
    assert valued(family, NOTHING, "right", EVERYTHING)["giou"] == 1.0
    assert valued(family, NOTHING, "fault", EVERYTHING)["giou"] == 0.0


def test_a_policy_that_never_parses_scores_nothing_on_sentences_without_a_target() -> None:
    family = Referring("one", "exclude", True)
    truths = [OBJECT, NOTHING, NOTHING, OBJECT]
    rows = [family.parts(NOTHING.astype(np.uint8), truth, None, True) for truth in truths]
    table = scores(family, rows, 0, 0)
    assert {key: table[key].value for key in ("giou", "ciou", "n_acc", "t_acc")} == {
        "giou": 0.0, "ciou": 0.0, "n_acc": 0.0, "t_acc": 0.0,
    }  # fmt: skip
    silent = [family.parts(NOTHING.astype(np.uint8), truth, None) for truth in truths]
    assert scores(family, silent, 0, 0)["giou"].value == 0.5  # by choice, not by a fault


def test_a_fault_in_training_is_scored_so_too() -> None:
    def score(mask, truth, faulty):
        parsed = Parsed(fault=ParseFault.NO_ANSWER if faulty else None)
        answer = Answer(text="", parsed=parsed, mask=mask, length=1, finished=True)
        sample = Sample(id="a", image=np.zeros((*mask.shape, 3), np.uint8), mask=truth)
        return {name: float(value[0]) for name, value in brief(answer, sample).items() if name in NAMES}

    assert score(NOTHING, NOTHING, faulty=True) == {"iou": 0.0, "sm": 0.0, "mae": 1.0, "fault_rate": 1.0}
    assert score(NOTHING, NOTHING, faulty=False) == {"iou": 1.0, "sm": 1.0, "mae": 0.0, "fault_rate": 0.0}
    assert score(NOTHING, OBJECT, faulty=True) == {**score(NOTHING, OBJECT, faulty=False), "fault_rate": 1.0}
    assert set(score(HALF, OBJECT, faulty=False)) == set(NAMES)
