"""Percentile bootstrap over clusters of samples that are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64


def numbered(names: Sequence[Hashable]) -> Int64[np.ndarray, "n"]:
    """Return the number of each sample's cluster; clusters are numbered from 0 by first appearance.

    Args:
        names: name of each sample's cluster, such as the image to which a referring sentence belongs.
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def resamples(count: int, draws: int, seed: int) -> Iterator[Int64[np.ndarray, "count"]]:
    """Yield the indices of `draws` resamples, each of `count` clusters drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.integers(0, count, count)


def paired_bootstrap(
    before: Float[np.ndarray, "n"],
    after: Float[np.ndarray, "n"],
    seed: int,
    draws: int = 10_000,
    level: float = 0.95,
    clusters: Int64[np.ndarray, "n"] | None = None,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of mean(after - before) over resampled clusters.

    Sources: Efron 1979; for clusters, Davison and Hinkley 1997, section 3.8. A drawn cluster contributes all
    of its samples, so a resample may have more or fewer than n samples; its mean is over its own samples.

    Args:
        before: one score per sample.
        after: one score per sample, in the same order.
        seed: of the resamples.
        draws: number of resamples.
        level: coverage of the interval.
        clusters: cluster of each sample, from `numbered`; if None, every sample is a cluster of its own.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(
            f"scores: must be as many before as after, at least 1; got {len(before)} and {len(after)}"
        )
    gain = after - before
    if clusters is None:
        clusters = np.arange(len(gain))
    sums, sizes = np.bincount(clusters, weights=gain), np.bincount(clusters)
    means = [sums[drawn].sum() / sizes[drawn].sum() for drawn in resamples(len(sums), draws, seed)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_weights(
    n: int, draws: int, seed: int, clusters: Int64[np.ndarray, "n"] | None = None
) -> Float64[np.ndarray, "draws n"]:
    """Return the share of each of n samples in every resample: times drawn / size; each row sums to 1.

    `weights @ values` are the means of the resamples. The interval of a score that is a function of means (a
    ratio of two, the maximum of a mean curve) is given by the quantiles of that function over the rows.
    Resamples are the same as in `paired_bootstrap` with the same seed and clusters.

    Args:
        n: number of samples.
        draws: number of resamples. The result takes 8 bytes per sample and resample.
        seed: of the resamples.
        clusters: cluster of each sample, from `numbered`; if None, every sample is a cluster of its own.

    Raises:
        ValueError: if n is less than 1.
    """
    if n < 1:
        raise ValueError(f"samples: must be at least one to draw from; got {n}")
    if clusters is None:
        clusters = np.arange(n)
    count, weights = int(clusters.max()) + 1, np.empty((draws, n))
    for row, drawn in zip(weights, resamples(count, draws, seed), strict=True):
        times = np.bincount(drawn, minlength=count)[clusters]
        np.divide(times, times.sum(), out=row)
    return weights
