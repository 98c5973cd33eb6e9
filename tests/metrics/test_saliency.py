"""Scores of sets of real maps, through the command line, are those of pysodmetrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segrl.metrics.functional.overlap import iou, mean_absolute_error
from segrl.metrics.functional.structure import structure
from segrl.metrics.saliency import METRICS, NAMES, Saliency, brief
from segrl.types import Answer, Parsed, ParseFault, Sample

OURS = {"giou_empty_is_1": "iou"}
SETS = {
    **{
        f"sod80/{one}": (f"saliency_maps/preds/{one}", "saliency_maps/masks")
        for one in ("PiCANet", "DSS", "Amulet")
    },
    "sod80/PiCANet_binarised128": ("saliency_maps/preds/PiCANet", "saliency_maps/masks"),
    "cod10k3/SINet": ("cod10k_maskpred/preds_SINet", "cod10k_maskpred/masks"),
    "pysod_test_data": ("pysod_test_data/preds", "pysod_test_data/masks"),
    "smeasure_demo": ("smeasure_demo/demo/FG", "smeasure_demo/demo/GT"),
}


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_value_of_a_set_is_pysodmetrics(cli, tmp_path: Path, realdata: Path, name: str) -> None:
    expected = json.loads((realdata / "pysod_expected.json").read_text())["sets"][name]
    maps, truths = (realdata / folder for folder in SETS[name])
    for folder in ("pred", "gt"):
        (tmp_path / folder).mkdir()
    for stem in expected["per_image"]:
        of_truth = stem.split("_")[0] if name == "smeasure_demo" else stem
        (tmp_path / "gt" / f"{stem}.png").symlink_to(truths / f"{of_truth}.png")
        if name.endswith("binarised128"):
            grey = np.asarray(Image.open(maps / f"{stem}.png").convert("L"))
            Image.fromarray((grey >= 128).astype(np.uint8) * 255).save(tmp_path / "pred" / f"{stem}.png")
        else:
            (tmp_path / "pred" / f"{stem}.png").symlink_to(maps / f"{stem}.png")
    wanted = [OURS.get(key, key) for key in expected["dataset"]]
    out = tmp_path / "scores.json"
    code, _, err = cli(
        f"pred={tmp_path}/pred", f"gt={tmp_path}/gt", f"out={out}", f"metrics=[{','.join(wanted)}]",
        "draws=0", module="score", runs=None,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["n"] == expected["n"] and found["intervals"] == dict.fromkeys(wanted)
    for key, value in expected["dataset"].items():
        assert found[OURS.get(key, key)] == pytest.approx(value, abs=1e-9), key


def answered(mask: np.ndarray, truth: np.ndarray, fault: ParseFault | None, ignore=None) -> dict[str, float]:
    """Return the scores that a training logs for one answer."""
    answer = Answer(text="", parsed=Parsed(fault=fault), mask=mask, length=1, finished=True)
    sample = Sample(id="a", image=np.zeros((*mask.shape, 3), np.uint8), mask=truth, ignore=ignore)
    return {name: float(value[0]) for name, value in brief(answer, sample).items() if name in NAMES}


def test_a_training_scores_masks_as_the_functions_on_masks_do() -> None:
    rng = np.random.default_rng(0)
    masks = [(rng.random((9, 13)) < 0.4, np.roll(rng.random((9, 13)) < 0.5, 1)) for _ in range(4)]
    for mask, truth in masks:
        found = answered(mask, truth, ParseFault.NO_ANSWER)
        assert set(found) == set(NAMES) and found["fault_rate"] == 1.0
        wanted = [iou(mask, truth), structure(mask, truth), mean_absolute_error(mask, truth)]
        assert [found[n] for n in NAMES[:3]] == pytest.approx(wanted, abs=1e-12)


def test_a_training_leaves_ignored_pixels_out_of_the_mask() -> None:
    truth, mask = np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    truth[:3], mask[:5] = True, True
    ignore = np.zeros((6, 6), bool)
    ignore[3:] = True
    assert answered(mask, truth, None, ignore)["iou"] == 1.0 > answered(mask, truth, None)["iou"]


def test_every_metric_is_there_alone_and_in_the_order_asked_for() -> None:
    truth = np.zeros((30, 40), bool)
    truth[5:20, 8:30] = True
    grey = np.roll(truth, 2, 1).astype(np.uint8) * 200 + 20
    everything = Saliency(METRICS).summary(Saliency(METRICS).parts(grey, truth, None))
    assert tuple(everything) == METRICS
    for name in METRICS:
        alone = Saliency((name,))
        assert alone.summary(alone.parts(grey, truth, None)) == {name: everything[name]}
    assert tuple(Saliency(("mae", "sm")).summary(Saliency(("mae", "sm")).parts(grey, truth, None))) == (
        "mae",
        "sm",
    )


@pytest.mark.parametrize("metrics", [(), ("sm", "iuo"), "sm"])
def test_no_metric_or_one_of_another_name_is_refused(metrics) -> None:
    with pytest.raises(ValueError, match="metrics: must be some of sm, wfm"):
        Saliency(metrics)


def test_ignored_pixels_are_refused_not_counted() -> None:
    grey, truth = np.zeros((4, 4), np.uint8), np.zeros((4, 4), bool)
    with pytest.raises(ValueError, match="ignored pixels"):
        Saliency(("sm",)).parts(grey, truth, ~truth)
    Saliency(("sm",)).parts(grey, truth, truth)  # none is ignored
