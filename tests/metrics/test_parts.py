"""Scores of a set: functions of mean parts, their intervals, and means over shares of the samples."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from segrl.metrics.functional.bootstrap import paired_bootstrap
from segrl.metrics.parts import RunningMeans, scores
from segrl.metrics.referring import Referring
from segrl.metrics.saliency import METRICS, Saliency

EPS = np.spacing(1)


def pairs(count: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw grey maps that reach from 0 to 255, so that nothing is stretched, and truths of growing size."""
    rng, made = np.random.default_rng(3), []
    for k in range(count):
        truth = np.zeros((12, 17), bool)
        truth[2 : 4 + k, 3 : 9 + k] = True
        level = 30 + 45 * k % 200  # each is parted best at a threshold of its own
        saliency = np.where(
            truth, rng.integers(level - 20, level + 20, truth.shape), rng.integers(0, level, truth.shape)
        )
        saliency.flat[0], saliency[3, 4] = 0, 255
        made.append((saliency.astype(np.uint8), truth))
    return made


def f_at(saliency: np.ndarray, truth: np.ndarray, threshold: int) -> float:
    found = saliency >= threshold
    hits = (found & truth).sum()
    precision, recall = hits / found.sum(), hits / truth.sum()
    return 1.3 * precision * recall / (0.3 * precision + recall) if hits else 0.0


def e_at(saliency: np.ndarray, truth: np.ndarray, threshold: int) -> float:
    """Compute the E-measure pixel by pixel, as in the paper's equations."""
    found = (saliency >= threshold).astype(float)
    a, b = found - found.mean(), truth - truth.mean()
    return float((((2 * a * b / (a * a + b * b + EPS) + 1) ** 2) / 4).sum() / (truth.size - 1))


def test_mean_and_largest_e_and_f_are_of_the_mean_curve() -> None:
    family, maps = Saliency(("mean_e", "max_e", "mean_f", "max_f")), pairs()
    table = scores(family, [family.parts(*pair, None) for pair in maps], 0, 0)
    for letter, at in (("e", e_at), ("f", f_at)):
        curves = np.array([[at(*pair, t) for t in range(255, -1, -1)] for pair in maps])
        assert table[f"mean_{letter}"].value == pytest.approx(curves.mean(0).mean(), abs=1e-12)
        assert table[f"max_{letter}"].value == pytest.approx(curves.mean(0).max(), abs=1e-12)
        assert table[f"max_{letter}"].value < curves.max(1).mean() - 1e-3  # the usual mistake


def two_squares() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return two pairs with IoU 2 of 4 and 30 of 40."""
    made = []
    for both, either in ((2, 4), (30, 40)):
        mask, truth = np.zeros((2, 20), np.uint8), np.zeros((2, 20), bool)
        mask.flat[:either], truth.flat[:both] = 255, True
        made.append((mask, truth))
    return made


@pytest.mark.parametrize("family", [Saliency(("iou", "ciou")), Referring("one", "exclude", False)])
def test_ciou_is_a_ratio_of_sums_and_iou_a_mean_of_ratios(family) -> None:
    table = scores(family, [family.parts(*pair, None) for pair in two_squares()], 0, 0)
    assert table["ciou"].value == pytest.approx(32 / 44, abs=1e-15)
    mean = table["iou" if "iou" in table else "giou"]
    assert mean.value == pytest.approx((2 / 4 + 30 / 40) / 2, abs=1e-15)


def test_intervals_are_quantiles_of_the_score_over_the_same_draws() -> None:
    family, maps = Saliency(("iou", "ciou", "max_f", "mae")), pairs(7)
    rows = [family.parts(*pair, None) for pair in maps]
    draws, seed = 230, 5  # more than are made at once, and no whole number of times
    table = scores(family, rows, draws, seed)
    for name in ("iou", "mae"):
        values = np.concatenate([row[name] for row in rows])
        expected = paired_bootstrap(np.zeros(7), values, seed, draws)
        assert table[name].interval == pytest.approx(expected, abs=1e-12)
    rng, again = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = [rows[i] for i in rng.integers(0, 7, 7)]
        cut = sum(row["intersection"][0] for row in drawn) / sum(row["union"][0] for row in drawn)
        again.append((cut, np.mean([row["f_curve"] for row in drawn], 0).max()))
    for name, values in zip(("ciou", "max_f"), np.array(again).T, strict=True):
        assert table[name].interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)
        assert table[name].interval[0] < table[name].value < table[name].interval[1]


def test_without_draws_there_is_no_interval_and_of_one_sample_it_has_no_width() -> None:
    family = Saliency(METRICS)
    rows = [family.parts(*pairs(1)[0], None)]
    without, one = scores(family, rows, 0, 0), scores(family, rows, 20, 0)
    assert tuple(without) == tuple(one) == METRICS
    for name in METRICS:
        assert without[name].interval is None and without[name].value == one[name].value
        assert one[name].interval == pytest.approx((one[name].value,) * 2, abs=1e-12)


def test_a_score_without_a_denominator_is_nan_without_a_warning() -> None:
    empty, object_ = np.zeros((3, 3), np.uint8), np.eye(3, dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = scores(
            Saliency(("iou", "ciou")), [Saliency(("iou", "ciou")).parts(empty, empty > 0, None)], 9, 0
        )
        assert (
            math.isnan(table["ciou"].value) and table["ciou"].interval is None and table["iou"].value == 1.0
        )
        skip = Referring("skip", "exclude", True)
        table = scores(skip, [skip.parts(empty, empty > 0, None)] * 2, 9, 0)
        assert {name for name, score in table.items() if math.isnan(score.value)} == table.keys() - {"n_acc"}
        table = scores(skip, [skip.parts(empty, object_, None)], 9, 0)
        assert math.isnan(table["n_acc"].value) and table["t_acc"].value == 0.0


def test_a_draw_without_a_denominator_does_not_count_as_zero() -> None:
    family, full = Referring("one", "exclude", True), np.full((3, 3), 255, np.uint8)
    rows = [family.parts(full, full > 0, None)] * 9 + [family.parts(full * 0, full < 0, None)]
    for seed in range(5):  # a third of the draws has no sample without a target
        assert scores(family, rows, 100, seed)["n_acc"].value == 1.0
        assert scores(family, rows, 100, seed)["n_acc"].interval == (1.0, 1.0)


# --- means over shares


def rows_of(values: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"curve": row[1:], "one": row[:1]} for row in values]


def filled(rows: list[dict[str, np.ndarray]]) -> RunningMeans:
    metric = RunningMeans({"one": 1, "curve": 3})
    for row in rows:
        metric.update(row)
    return metric


def test_means_of_two_unequal_shares_merge_to_the_mean_of_all_samples() -> None:
    values = np.random.default_rng(1).random((11, 4))
    whole, shares = filled(rows_of(values)), [filled(rows_of(values[:2])), filled(rows_of(values[2:]))]
    merged = RunningMeans({"one": 1, "curve": 3})
    for name, reduce in merged._reductions.items():
        setattr(merged, name, reduce(torch.stack([getattr(share, name) for share in shares])))
    merged._update_count = 1
    assert int(merged.count) == 11
    for name, mean in merged.compute().items():
        assert torch.allclose(mean, whole.compute()[name], rtol=0, atol=1e-15)
    assert whole.compute()["curve"].numpy() == pytest.approx(values[:, 1:].mean(0), abs=1e-15)
    assert whole.compute()["one"].numpy() == pytest.approx(values[:, 0].mean(), abs=1e-15)


def test_sums_stay_float64_where_the_module_around_them_does_not() -> None:
    metric = filled(rows_of(np.full((3, 4), 1 + 2**-40)))
    around = torch.nn.ModuleDict({"metric": metric, "layer": torch.nn.Linear(1, 1)})
    around.half().float().bfloat16().to("cpu")
    assert around["layer"].weight.dtype == torch.bfloat16
    assert metric.sums.dtype == torch.float64 and metric.count.dtype == torch.int64
    assert float(metric.compute()["one"]) == 1 + 2**-40
    metric.reset()
    metric.update({"one": np.array([0.25]), "curve": np.zeros(3)})
    assert metric.sums.dtype == torch.float64 and float(metric.compute()["one"]) == 0.25
