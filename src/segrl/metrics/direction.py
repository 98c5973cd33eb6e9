"""Whether a higher value of a metric is better; used by `callbacks.best` and by sweeps."""

from __future__ import annotations

LOWER_IS_BETTER = frozenset({"mae", "fault_rate", "hce"})
"""Metrics of which less is better; of all others, also those of users, more is better."""


def higher_is_better(metric: str) -> bool:
    """Return whether more is better; the name may have a prefix, such as `test/<dataset>/mae`."""
    return metric.rpartition("/")[2] not in LOWER_IS_BETTER


def worst(metric: str) -> float:
    """Return the infinity that every other value of the metric is better than."""
    return float("-inf") if higher_is_better(metric) else float("inf")


def better(metric: str, value: float, than: float) -> bool:
    """Return whether `value` is better than `than`; False if one of them is NaN."""
    return value > than if higher_is_better(metric) else value < than
