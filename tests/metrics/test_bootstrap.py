from __future__ import annotations

import inspect

import numpy as np
import pytest

from segrl.metrics.functional.bootstrap import bootstrap_weights, numbered, paired_bootstrap


def test_a_gain_that_is_the_same_everywhere_has_no_interval_around_it() -> None:
    before = np.random.default_rng(0).random(50)
    low, high = paired_bootstrap(before, before + 0.25, seed=0, draws=300)
    assert (low, high) == pytest.approx((0.25, 0.25), abs=1e-12)


def test_two_samples_by_hand() -> None:
    # gains 0 and 1: a mean of two draws is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4
    before, after = np.zeros(2), np.array([0.0, 1.0])
    assert paired_bootstrap(before, after, seed=1, draws=2000, level=0.95) == (0.0, 1.0)
    assert paired_bootstrap(before, after, seed=1, draws=2000, level=0.4) == (0.5, 0.5)


def test_the_interval_is_that_of_a_normal_mean_for_many_samples() -> None:
    rng = np.random.default_rng(2)
    before = rng.random(400)
    gain = rng.normal(0.05, 0.2, 400)
    low, high = paired_bootstrap(before, before + gain, seed=3, draws=3000)
    reach = 1.96 * gain.std(ddof=1) / 400**0.5
    assert low == pytest.approx(gain.mean() - reach, abs=0.1 * reach)
    assert high == pytest.approx(gain.mean() + reach, abs=0.1 * reach)


def test_pairing_removes_what_differs_between_samples() -> None:
    rng = np.random.default_rng(4)
    before = rng.normal(0, 100, 200)  # far wider than the gain
    low, high = paired_bootstrap(before, before + rng.normal(0.5, 0.1, 200), seed=5, draws=500)
    assert 0.45 < low < high < 0.55


def test_a_higher_confidence_level_gives_a_wider_interval() -> None:
    before, after = np.random.default_rng(6).random((2, 60))
    low, high = paired_bootstrap(before, after, seed=7, draws=1000, level=0.5)
    wide_low, wide_high = paired_bootstrap(before, after, seed=7, draws=1000, level=0.99)
    assert wide_low < low < (after - before).mean() < high < wide_high


def test_exchanging_before_and_after_negates_the_interval() -> None:
    before, after = np.random.default_rng(8).random((2, 40))
    low, high = paired_bootstrap(before, after, seed=9, draws=500)
    assert paired_bootstrap(after, before, seed=9, draws=500) == pytest.approx((-high, -low), abs=1e-12)


def test_the_same_seed_draws_the_same_interval_and_another_does_not() -> None:
    before, after = np.random.default_rng(10).random((2, 40))
    first = paired_bootstrap(before, after, seed=11, draws=200)
    assert first == paired_bootstrap(before, after, seed=11, draws=200)
    assert first != paired_bootstrap(before, after, seed=12, draws=200)


@pytest.mark.parametrize(("before", "after"), [(3, 4), (4, 3), (0, 0), (0, 2)])
def test_unequal_or_no_scores_are_refused_with_their_numbers(before: int, after: int) -> None:
    as_in_use = inspect.unwrap(paired_bootstrap)  # without the shape check of the tests
    with pytest.raises(ValueError, match=f"got {before} and {after}"):
        as_in_use(np.zeros(before), np.zeros(after), seed=0)


# --- weights


def test_weights_are_shares_of_n_draws() -> None:
    weights = bootstrap_weights(7, 300, seed=0)
    assert weights.shape == (300, 7)
    assert weights.dtype == np.float64
    assert weights.sum(1) == pytest.approx(np.ones(300), abs=1e-12)
    assert (weights * 7 == np.round(weights * 7)).all()
    assert (weights >= 0).all()


def test_one_sample_always_weighs_everything() -> None:
    assert (bootstrap_weights(1, 5, seed=0) == 1.0).all()


def test_weights_of_two_samples_follow_two_fair_coins() -> None:
    first = bootstrap_weights(2, 8000, seed=1)[:, 0]
    assert [np.mean(first == share) for share in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_weights_have_the_moments_of_the_multinomial() -> None:
    n, weights = 20, bootstrap_weights(20, 20_000, seed=2)
    assert weights.mean(0) == pytest.approx(np.full(n, 1 / n), abs=2e-3)
    covariance = np.cov(weights.T)
    assert np.diag(covariance) == pytest.approx(np.full(n, (1 - 1 / n) / n**2), rel=0.05)
    assert covariance[0, 1] == pytest.approx(-1 / n**3, rel=0.3)


def test_means_by_weights_are_those_of_the_paired_bootstrap() -> None:
    before, after = np.random.default_rng(3).random((2, 60))
    means = bootstrap_weights(60, 400, seed=4) @ (after - before)
    interval = paired_bootstrap(before, after, seed=4, draws=400)
    assert np.quantile(means, [0.025, 0.975]) == pytest.approx(interval, abs=1e-12)


def test_a_quotient_of_means_gets_an_interval() -> None:
    # cumulative IoU of equal samples is one number, whichever are drawn
    weights = bootstrap_weights(30, 200, seed=5)
    both, either = np.full(30, 3.0), np.full(30, 4.0)
    assert (weights @ both) / (weights @ either) == pytest.approx(np.full(200, 0.75), abs=1e-12)


def test_weights_are_a_function_of_the_seed() -> None:
    assert (bootstrap_weights(9, 20, seed=6) == bootstrap_weights(9, 20, seed=6)).all()
    assert (bootstrap_weights(9, 20, seed=6) != bootstrap_weights(9, 20, seed=7)).any()


def test_weights_for_zero_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples: must be at least one"):
        bootstrap_weights(0, 10, seed=0)


# --- clusters


def test_clusters_are_numbered_as_they_first_appear() -> None:
    assert numbered(["b", "a", "b", ("a",), "a"]).tolist() == [0, 1, 0, 2, 1]


def test_one_sample_to_a_cluster_gives_the_digits_of_no_clusters() -> None:
    before, after = np.random.default_rng(13).random((2, 97))
    alone = numbered([f"image {i}" for i in range(97)])
    assert paired_bootstrap(before, after, 14, 300, clusters=alone) == paired_bootstrap(
        before, after, 14, 300
    )
    assert (bootstrap_weights(97, 50, 15, alone) == bootstrap_weights(97, 50, 15)).all()
    rng, gain = np.random.default_rng(14), after - before  # as it was before there were clusters
    means = [gain[rng.integers(0, 97, 97)].mean() for _ in range(300)]
    assert paired_bootstrap(before, after, 14, 300) == tuple(
        np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    )


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_sentences_that_repeat_an_object_make_no_interval_narrower(copies: int) -> None:
    before, after = np.random.default_rng(16).random((2, 60))
    objects = [f"object {i}" for i in range(60)]
    again = numbered(objects * copies)
    once = paired_bootstrap(before, after, 17, 800)
    many = paired_bootstrap(np.tile(before, copies), np.tile(after, copies), 17, 800, clusters=again)
    assert many == pytest.approx(once, abs=1e-12)
    naive = paired_bootstrap(np.tile(before, copies), np.tile(after, copies), 17, 800)
    narrower = (naive[1] - naive[0]) / (once[1] - once[0])
    assert narrower == pytest.approx(copies**-0.5, rel=0.1)
    weights = bootstrap_weights(60 * copies, 200, 18, again)
    expected = bootstrap_weights(60, 200, 18) @ after
    assert weights @ np.tile(after, copies) == pytest.approx(expected, abs=1e-12)


def test_uneven_clusters_are_drawn_whole() -> None:
    # clusters of gains (0, 0, 3) and (4): two draws give 6/6, 7/4 or 8/2 with chances 1/4, 1/2, 1/4
    before, after = np.zeros(4), np.array([0.0, 4.0, 0.0, 3.0])
    clusters = numbered(["left", "right", "left", "left"])
    assert paired_bootstrap(before, after, 19, 2000, clusters=clusters) == (1.0, 4.0)
    assert paired_bootstrap(before, after, 19, 2000, level=0.4, clusters=clusters) == (1.75, 1.75)
    drawn = bootstrap_weights(4, 3000, 20, clusters)
    assert drawn.sum(1) == pytest.approx(np.ones(3000), abs=1e-12)
    values, counts = np.unique(np.round(drawn @ after, 12), return_counts=True)
    assert values.tolist() == [1.0, 1.75, 4.0]
    assert counts / 3000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_clusters_against_brute_force() -> None:
    rng = np.random.default_rng(21)
    names = rng.integers(0, 25, 120)
    before, after = rng.random((2, 120))
    clusters, draw, means = numbered(names.tolist()), np.random.default_rng(22), []
    members = [np.flatnonzero(clusters == c) for c in range(clusters.max() + 1)]
    for _ in range(300):
        drawn = np.concatenate([members[c] for c in draw.integers(0, len(members), len(members))])
        means.append((after - before)[drawn].mean())
    assert paired_bootstrap(before, after, 22, 300, clusters=clusters) == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=1e-12
    )
    weights = bootstrap_weights(120, 300, 22, clusters)
    assert weights @ (after - before) == pytest.approx(means, abs=1e-12)
