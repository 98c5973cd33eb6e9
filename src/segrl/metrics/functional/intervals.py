"""How far a mean could have come out otherwise."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


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
