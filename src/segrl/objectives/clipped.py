"""Compute clipped surrogate losses per token.

Each surrogate is a function of (log-probabilities, log-probabilities of the policy that sampled, advantages,
loss mask). `low` and `high` bound how far the importance ratio may fall below and rise above 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Surrogate(NamedTuple):
    """Value of a surrogate at every token; all tensors are `[N, T]`."""

    loss: Tensor
    """Differentiable loss, to be minimised."""
    ratio: Tensor
    """Importance ratio: probability under the policy divided by that under the policy that sampled."""
    clipped: Tensor
    """bool, where a bound is active: the gradient is zero there, or for CISPO its weight is clipped."""


def importance_ratio(logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return `r = π / π_old`; its logarithm is clamped to [-20, 20] to prevent overflow."""
    return (logprobs - old.detach()).clamp(-20.0, 20.0).exp()


def sequence_ratio(
    logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """Return `s[n] = (π(y_n) / π_old(y_n))^(1/|y_n|)` at every token (GSPO, arXiv 2507.18071, eq. 7)."""
    difference = (logprobs - old.detach()).masked_fill(~mask, 0.0)
    mean = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return mean.clamp(-20.0, 20.0).exp().expand_as(logprobs)


def _held(
    ratio: Float[Tensor, "N T"], gain: Float[Tensor, "N T"], low: float, high: float, dual: float | None
) -> Surrogate:
    """Return the loss `-min(r A, clip(r, 1-low, 1+high) A)`, or `-max(min(...), dual A)` where A < 0."""
    free, bound = ratio * gain, ratio.clamp(1 - low, 1 + high) * gain
    value = torch.minimum(free, bound)
    clipped = bound < free
    if dual is not None:
        floor = dual * gain
        clipped = clipped | ((gain < 0) & (value < floor))
        value = torch.where(gain < 0, torch.maximum(value, floor), value)
    return Surrogate(-value, ratio, clipped)


def ppo_clip(
    logprobs: Float[Tensor, "N T"],
    old: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    low: float,
    high: float,
    dual: float | None = None,
) -> Surrogate:
    """Return the loss `-min(r A, clip(r, 1-low, 1+high) A)` (PPO, arXiv 1707.06347, eq. 7).

    Separate bounds follow DAPO (arXiv 2503.14476, eq. 10).

    Args:
        logprobs: log-probabilities under the policy, with gradient.
        old: log-probabilities under the policy that sampled.
        advantages: one per token.
        mask: loss mask; not used, because the ratio is per token.
        low: how far the ratio may fall below 1.
        high: how far the ratio may rise above 1.
        dual: where A < 0, bounds the loss by `-dual A` (dual-clip PPO, arXiv 1912.09729, eq. 8). If None,
            there is no such bound.
    """
    return _held(importance_ratio(logprobs, old), advantages.detach(), low, high, dual)


def gspo_clip(
    logprobs: Float[Tensor, "N T"],
    old: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    low: float,
    high: float,
) -> Surrogate:
    """Return the loss of `ppo_clip` with one ratio per completion (GSPO, arXiv 2507.18071, eq. 5)."""
    return _held(sequence_ratio(logprobs, old, mask), advantages.detach(), low, high, None)


def cispo_clip(
    logprobs: Float[Tensor, "N T"],
    old: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    low: float,
    high: float,
) -> Surrogate:
    """Return the loss `-detach(clip(r, 1-low, 1+high)) A log π` (CISPO: arXiv 2506.13585, eq. 4).

    The ratio is a clipped weight, so clipped tokens keep a gradient. With `low=1` there is no lower bound.
    `mask` is not used, because the ratio is per token.
    """
    ratio = importance_ratio(logprobs, old)
    bound = ratio.detach().clamp(1 - low, 1 + high)
    return Surrogate(-bound * advantages.detach() * logprobs, ratio, bound != ratio.detach())
