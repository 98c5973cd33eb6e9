"""Compute the critic's loss of Proximal Policy Optimization, and whiten advantages."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segrl.objectives.masked import counted, weighted_sum
from segrl.types import LossOutput


def whiten(values: Float[Tensor, "N T"], mean: float, deviation: float) -> Float[Tensor, "N T"]:
    """Return `(x - mean) / sqrt(deviation² + 1e-8)`.

    Args:
        values: x.
        mean: of the whole update on all ranks.
        deviation: likewise.
    """
    # 1e-8 inside the root: where all values are equal up to rounding, the result stays small.
    return (values - mean) / math.sqrt(deviation**2 + 1e-8)


def explained_variance(
    values: Float[Tensor, "N T"], returns: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, ""]:
    """Return `1 - Var(R - V) / Var(R)` over the token mask: 1 for a perfect critic, 0 for a constant one.

    Return 0 if R is constant up to rounding.
    """
    spread = returns[mask].var(unbiased=False)
    left = (returns - values)[mask].var(unbiased=False)
    known = spread > 1e-10 * (1 + returns[mask].square().mean())
    return torch.where(known, 1 - left / spread.clamp_min(1e-12), 0.0)


def clipped_value_loss(
    values: Float[Tensor, "N T"],
    old: Float[Tensor, "N T"],
    returns: Float[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    clip: float,
) -> LossOutput:
    """Return the loss `½ Σ_nt w[n,t] max((V - R)², (V_old + clip(V - V_old, -c, c) - R)²)`.

    As in OpenAI's released PPO code (Baselines).

    Args:
        values: V, the critic's values, with gradient.
        old: V_old, the critic's values when the completions were sampled.
        returns: R, the critic's targets.
        weights: w, weight of each token in the loss; see `objectives.masked`.
        clip: c, in units of the return.
    """
    values, old, returns = (counted(x, weights) for x in (values, old.detach(), returns.detach()))
    near = old + (values - old).clamp(-clip, clip)
    free, bound = (values - returns).square(), (near - returns).square()
    loss = weighted_sum(torch.maximum(free, bound) / 2, weights)
    stats = {
        "value_loss": loss.detach(),
        "value_clip": weighted_sum((bound > free).to(values.dtype), weights).detach(),
    }
    return LossOutput(loss=loss, stats=stats)
