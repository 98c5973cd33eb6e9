"""Fast paths that only some devices have are believed once they have repeated the plain path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def repeats(
    what: str, fast: Callable[[], Sequence[Tensor]], plain: Callable[[], Sequence[Tensor]], close: float
) -> bool:
    """Return whether a fast path gives what the plain one gives; where it does not, or raises, say so in one line.

    Args:
        what: names the fast path and what is done without it.
        fast: computes some tensors.
        plain: computes the same ones.
        close: largest distance of one of them, as a share of its norm.
    """
    try:
        far = max(distance(one, other) for one, other in zip(fast(), plain(), strict=True))
    except RuntimeError as error:
        give_up(what, error)
        return False
    if not far <= close:  # a distance that is no number is none
        give_up(what, f"its values are off by {far:.1%}")
    return far <= close


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `other`."""
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


def give_up(what: str, reason: RuntimeError | str) -> None:
    """Say in one line that a fast path is not used, and why."""
    if isinstance(reason, torch.OutOfMemoryError):
        reason = "memory ran out"
    warnings.warn(f"{what}: {str(reason).strip().splitlines()[0]}", stacklevel=3)
