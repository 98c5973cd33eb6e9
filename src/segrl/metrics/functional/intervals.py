"""How far a mean could have come out otherwise."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64


def paired_bootstrap(
    before: Float[np.ndarray, "n"],
    after: Float[np.ndarray, "n"],
    seed: int,
    draws: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of mean(after - before) when the same n samples are drawn anew (Efron 1979).

    Args:
        before: one score per sample.
        after: the same, in the same order.
        seed: of the draws.
        draws: resamples.
        level: of the interval.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(f"as many scores before as after are needed; got {len(before)} and {len(after)}")
    gain, rng = after - before, np.random.default_rng(seed)
    means = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_weights(n: int, draws: int, seed: int) -> Float64[np.ndarray, "draws n"]:
    """How much each of n samples weighs when n are drawn anew: times drawn / n, so that every row sums to 1.

    `weights @ values` are the means of the resamples. A score of a set that is a function of means (the quotient of two,
    the maximum of a mean curve) has the quantiles of that function, over the rows, as its interval. The draws are those of
    `paired_bootstrap` with the same seed.

    Args:
        n: samples.
        draws: resamples; the result takes 8 bytes for each sample of each, and nothing beside it grows with both.
        seed: of the draws.

    Raises:
        ValueError: if there is no sample.
    """
    if n < 1:
        raise ValueError(f"at least one sample is needed to draw from; got {n}")
    rng, weights = np.random.default_rng(seed), np.empty((draws, n))
    for row in weights:
        np.divide(np.bincount(rng.integers(0, n, n), minlength=n), n, out=row)
    return weights
