"""Say for each metric whether a higher value is better: used by `callbacks.best` and by sweeps."""

from __future__ import annotations

LOWER_IS_BETTER = frozenset({"mae", "fault_rate", "hce"})
"""Errors, faults and the effort of a correction; of every other metric, and of a user's own, more is better."""


def higher_is_better(metric: str) -> bool:
    """Return whether more is better, of `mae` as of `test/<dataset>/mae`."""
    return metric.rpartition("/")[2] not in LOWER_IS_BETTER


def worst(metric: str) -> float:
    """Return the value that every other one is better than."""
    return float("-inf") if higher_is_better(metric) else float("inf")


def better(metric: str, value: float, than: float) -> bool:
    """Return whether a value is better than another; NaN is never."""
    return value > than if higher_is_better(metric) else value < than
