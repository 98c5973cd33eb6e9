"""Compare a fast path that only some devices have with the plain path before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

FAILURES = (RuntimeError, TypeError, ValueError)
"""Errors of a kernel that this machine or this release of torch lacks; each one selects the plain path."""


def repeats(
    what: str, fast: Callable[[], Sequence[Tensor]], plain: Callable[[], Sequence[Tensor]], close: float
) -> bool:
    """Return whether a fast path gives the tensors of the plain path; if not, warn in one line.

    One of `FAILURES` in either path counts as a difference.

    Args:
        what: names the fast path and its substitute, for the warning.
        fast: computes some tensors.
        plain: computes the same tensors.
        close: largest allowed `distance` of a tensor.
    """
    try:
        distances = [distance(one, other) for one, other in zip(fast(), plain(), strict=True)]
    except FAILURES as error:
        give_up(what, error)
        return False
    same = all(far <= close for far in distances)  # NaN compares as False
    if not same:
        give_up(what, "its values are off by " + ", ".join(f"{far:.1%}" for far in distances))
    return same


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `other`."""
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@contextmanager
def learning_apart(device: torch.device) -> Iterator[None]:
    """Enable gradients and disable inference mode and autocast inside, whatever modes the caller is in."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def give_up(what: str, reason: Exception | str) -> None:
    """Warn in one line that a fast path is not used, and why."""
    if isinstance(reason, torch.OutOfMemoryError):
        reason = "memory ran out"
    warnings.warn(f"{what}: {first_line(reason)}", stacklevel=3)


def first_line(reason: Exception | str) -> str:
    """Return the first line of an error's message, or its repr if the message is empty."""
    return next(iter(str(reason).strip().splitlines()), repr(reason))
