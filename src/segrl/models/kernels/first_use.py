"""Fast paths that only some devices have are held against the plain path before they serve."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

FAILURES = (RuntimeError, TypeError, ValueError)
"""Errors of a kernel that this machine, or this release of torch, lacks; any of them means the plain path."""


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
        distances = [distance(one, other) for one, other in zip(fast(), plain(), strict=True)]
    except FAILURES as error:
        give_up(what, error)
        return False
    same = all(far <= close for far in distances)  # NaN is at no distance
    if not same:
        give_up(what, "its values are off by " + ", ".join(f"{far:.1%}" for far in distances))
    return same


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `other`."""
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@contextmanager
def learning_apart(device: torch.device) -> Iterator[None]:
    """Inside, gradients are recorded and nothing is cast, wherever in a pass or an evaluation the caller stands."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def give_up(what: str, reason: Exception | str) -> None:
    """Say in one line that a fast path is not used, and why."""
    if isinstance(reason, torch.OutOfMemoryError):
        reason = "memory ran out"
    warnings.warn(f"{what}: {first_line(reason)}", stacklevel=3)


def first_line(reason: Exception | str) -> str:
    """Return the first line of an error, or what kind of error it is where it says nothing."""
    return next(iter(str(reason).strip().splitlines()), repr(reason))
