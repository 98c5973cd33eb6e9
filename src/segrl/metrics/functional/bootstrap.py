"""How far a mean could have come out otherwise: percentile bootstrap over clusters of samples that are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64


def numbered(names: Sequence[Hashable]) -> Int64[np.ndarray, "n"]:
    """Return the number of each sample's cluster, clusters counted from 0 in the order in which they first appear.

    Args:
        names: of each sample's cluster, such as the image that a sentence is about.
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def paired_bootstrap(
    before: Float[np.ndarray, "n"],
    after: Float[np.ndarray, "n"],
    seed: int,
    draws: int = 10_000,
    level: float = 0.95,
    clusters: Int64[np.ndarray, "n"] | None = None,
) -> tuple[float, float]:
    """Return the percentile interval of mean(after - before) when the clusters of the n samples are drawn anew.

    Efron 1979; of clusters: Davison and Hinkley 1997, section 3.8. A cluster that is drawn brings all of its samples, so
    a resample may have more or fewer than n, and its mean is over those that it has.

    Args:
        before: one score per sample.
        after: the same, in the same order.
        seed: of the draws.
        draws: resamples.
        level: of the interval.
        clusters: of `numbered`; if None, every sample is a cluster of its own.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(f"as many scores before as after are needed; got {len(before)} and {len(after)}")
    gain, rng = after - before, np.random.default_rng(seed)
    if clusters is None:
        clusters = np.arange(len(gain))
    sums, sizes = np.bincount(clusters, weights=gain), np.bincount(clusters)
    means = []
    for _ in range(draws):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_weights(
    n: int, draws: int, seed: int, clusters: Int64[np.ndarray, "n"] | None = None
) -> Float64[np.ndarray, "draws n"]:
    """Return the share of each of n samples in every resample: times drawn / all that was drawn; every row sums to 1.

    `weights @ values` are the means of the resamples. A score of a set that is a function of means (the quotient of two,
    the maximum of a mean curve) has the quantiles of that function, over the rows, as its interval. The draws are those of
    `paired_bootstrap` with the same seed and the same clusters.

    Args:
        n: samples.
        draws: resamples; the result takes 8 bytes for each sample of each, and nothing beside it grows with both.
        seed: of the draws.
        clusters: of `numbered`; if None, every sample is a cluster of its own.

    Raises:
        ValueError: if there is no sample.
    """
    if n < 1:
        raise ValueError(f"at least one sample is needed to draw from; got {n}")
    if clusters is None:
        clusters = np.arange(n)
    count = int(clusters.max()) + 1
    rng, weights = np.random.default_rng(seed), np.empty((draws, n))
    for row in weights:
        times = np.bincount(rng.integers(0, count, count), minlength=count)[clusters]
        np.divide(times, times.sum(), out=row)
    return weights
