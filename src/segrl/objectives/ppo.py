"""The critic's side of Proximal Policy Optimization."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segrl.objectives.masked import counted, weighted_sum
from segrl.types import LossOutput


def whiten(values: Float[Tensor, "N T"], mean: float, deviation: float) -> Float[Tensor, "N T"]:
    """Mean 0 and deviation 1, given those of the whole update on all ranks."""
    # Added inside the root: rounding noise must not become advantage.
    return (values - mean) / math.sqrt(deviation**2 + 1e-8)


def explained_variance(
    values: Float[Tensor, "N T"], returns: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, ""]:
    r"""\( 1 - \mathrm{Var}(R - V) / \mathrm{Var}(R) \): 1 for a critic that knows, 0 for one that says the mean; zero if R is constant."""
    spread = returns[mask].var(unbiased=False)
    left = (returns - values)[mask].var(unbiased=False)
    known = spread > 1e-10 * (1 + returns[mask].square().mean())
    return torch.where(known, 1 - left / spread.clamp_min(1e-12), 0.0)


def clipped_value_loss(
    values: Float[Tensor, "N T"], old: Float[Tensor, "N T"], returns: Float[Tensor, "N T"], weights: Float[Tensor, "N T"],
    clip: float,
) -> LossOutput:  # fmt: skip
    r"""\( \frac12 \sum_{nt} w_{nt} \max[(V - R)^2, (V_{old} + \mathrm{clip}(V - V_{old}, \pm c) - R)^2] \) (PPO's released code).

    Args:
        values: of the critic, with gradient.
        old: of the critic when the completions were sampled.
        returns: what the critic should have said.
        weights: share of each token.
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
