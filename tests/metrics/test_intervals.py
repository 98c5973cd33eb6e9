from __future__ import annotations

import inspect

import numpy as np
import pytest

from segrl.metrics.functional.intervals import paired_bootstrap


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
