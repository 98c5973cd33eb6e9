"""Compute advantages by generalised advantage estimation (GAE, arXiv 1506.02438) with a decay per token.

The decay `λ[n,t]` makes both variants one function:

- constant: GAE of tokens;
- 1 inside a segment and below 1 where it closes: GAE of segments (the bi-level GAE of VAGEN).

Decoupled GAE (VC-PPO, arXiv 2503.01491) calls `gae` twice: with a decay for the policy's advantages, and with
1 for the critic's targets.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class Decay(Protocol):
    """A decay per token, such as `constant_decay` and `segment_decay`."""

    def __call__(self, mask: Tensor, closes: Tensor) -> Tensor:
        """Return λ after each token, `[N, T]`, from the token mask and the tokens that close a segment."""
        ...


def gae(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    decay: Float[Tensor, "N T"],
    discount: float,
) -> Float[Tensor, "N T"]:
    """Return `A_t = δ_t + γ λ_t A_{t+1}` with `δ_t = r_t + γ V_{t+1} - V_t` (eq. 16).

    After the last token of a completion, V and A are zero.

    Args:
        rewards: one per token.
        values: the critic's value of the state in which each token was sampled.
        mask: token mask; true tokens are contiguous from the left.
        decay: λ.
        discount: γ.
    """
    values = values.masked_fill(~mask, 0.0)  # no bootstrapping past the end
    following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    delta = (rewards + discount * following - values).masked_fill(~mask, 0.0)
    advantages, after = torch.zeros_like(delta), delta.new_zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        after = delta[:, t] + discount * decay[:, t] * after
        advantages[:, t] = after
    return advantages


def constant_decay(
    mask: Bool[Tensor, "N T"], closes: Bool[Tensor, "N T"], *, decay: float
) -> Float[Tensor, "N T"]:
    """Return `decay` at every token. `closes` is not used."""
    return torch.full(mask.shape, decay, device=mask.device)


def segment_decay(
    mask: Bool[Tensor, "N T"], closes: Bool[Tensor, "N T"], *, decay: float
) -> Float[Tensor, "N T"]:
    """Return `decay` where a segment closes and 1 elsewhere, so that credit does not decay inside a segment.

    Args:
        mask: token mask; not used.
        closes: tokens that complete a box or a point.
        decay: λ at these tokens.
    """
    return torch.where(closes, decay, 1.0)
