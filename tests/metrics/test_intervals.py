from __future__ import annotations

import inspect

import numpy as np
import pytest

from segrl.metrics.functional.intervals import bootstrap_weights, paired_bootstrap


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


def test_a_higher_level_is_wider() -> None:
    before, after = np.random.default_rng(6).random((2, 60))
    low, high = paired_bootstrap(before, after, seed=7, draws=1000, level=0.5)
    wide_low, wide_high = paired_bootstrap(before, after, seed=7, draws=1000, level=0.99)
    assert wide_low < low < (after - before).mean() < high < wide_high


def test_before_and_after_exchanged_turn_the_interval_around() -> None:
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


def test_two_samples_are_drawn_as_two_coins() -> None:
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


def test_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_weights(0, 10, seed=0)
