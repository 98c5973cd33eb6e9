"""Surrogates: what one token's step of the policy is worth, held near the policy that sampled it.

Each is a function of (log-probabilities, those of the policy that sampled, advantages, mask) and has two bounds: how
far the ratio may fall below and rise above 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Surrogate(NamedTuple):
    """Per token, `[N, T]`."""

    loss: Tensor
    """Differentiable, to be made small."""
    ratio: Tensor
    """Of the policy to the one that sampled."""
    clipped: Tensor
    """bool, where the bound holds the gradient back."""


def importance_ratio(logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""\( \rho = \pi / \pi_{old} \); its log is held within 20 so that a mismatch cannot overflow."""
    return (logprobs - old.detach()).clamp(-20.0, 20.0).exp()


def sequence_ratio(
    logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    r"""\( s_n = (\pi(y_n) / \pi_{old}(y_n))^{1/|y_n|} \), the same at every token (GSPO, arXiv 2507.18071, eq. 7)."""
    difference = (logprobs - old.detach()).masked_fill(~mask, 0.0)
    mean = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return mean.clamp(-20.0, 20.0).exp().expand_as(logprobs)


def _held(
    ratio: Float[Tensor, "N T"], gain: Float[Tensor, "N T"], low: float, high: float, dual: float | None
) -> Surrogate:
    r"""\( -\min(\rho A, \mathrm{clip}(\rho, 1 - low, 1 + high) A) \), below by \( dual \cdot A \) where A is negative."""
    free, bound = ratio * gain, ratio.clamp(1 - low, 1 + high) * gain
    value = torch.minimum(free, bound)
    clipped = bound < free
    if dual is not None:
        floor = dual * gain
        clipped = clipped | ((gain < 0) & (value < floor))
        value = torch.where(gain < 0, torch.maximum(value, floor), value)
    return Surrogate(-value, ratio, clipped)


def ppo_clip(
    logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"],
    *, low: float, high: float, dual: float | None = None,
) -> Surrogate:  # fmt: skip
    r"""\( -\min(\rho A,\ \mathrm{clip}(\rho, 1-low, 1+high)\, A) \) (PPO, arXiv 1707.06347, eq. 7; bounds apart: DAPO, eq. 10).

    Args:
        logprobs: of the policy, with gradient.
        old: of the policy that sampled.
        advantages: of the tokens.
        mask: tokens that count.
        low: how far the ratio may fall below 1.
        high: how far it may rise above 1.
        dual: bounds a negative advantage's term by this times it (dual-clip PPO, arXiv 1912.09729, eq. 8); none does not.
    """
    return _held(importance_ratio(logprobs, old), advantages.detach(), low, high, dual)


def gspo_clip(
    logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"],
    *, low: float, high: float,
) -> Surrogate:  # fmt: skip
    """As `ppo_clip`, with one ratio per completion, so whole completions are held back (GSPO, arXiv 2507.18071, eq. 5)."""
    return _held(sequence_ratio(logprobs, old, mask), advantages.detach(), low, high, None)


def cispo_clip(
    logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"],
    *, low: float, high: float,
) -> Surrogate:  # fmt: skip
    r"""\( -\mathrm{sg}[\mathrm{clip}(\rho, 1-low, 1+high)]\, A \log\pi \): weights are clipped, no token's gradient is lost.

    CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4); `low` of 1 leaves the lower side free.
    """
    ratio = importance_ratio(logprobs, old)
    bound = ratio.detach().clamp(1 - low, 1 + high)
    return Surrogate(-bound * advantages.detach() * logprobs, ratio, bound != ratio.detach())
