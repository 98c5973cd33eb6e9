"""Group Relative Policy Optimization."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from segrl.objectives.clipped import clipped_surrogate, importance_ratio
from segrl.objectives.kl import k3
from segrl.objectives.masked import counted, weighted_sum
from segrl.types import LossOutput


def grpo(
    logprobs: Float[Tensor, "N T"],
    old: Float[Tensor, "N T"] | None,
    reference: Float[Tensor, "N T"] | None,
    advantages: Float[Tensor, "N"],
    weights: Float[Tensor, "N T"],
    clip: tuple[float, float],
    kl_weight: float,
) -> LossOutput:
    r"""\( L = \sum_{nt} w_{nt} \left[ -\min(\rho A, \mathrm{clip}(\rho) A) + \beta\, k_3 \right] \) (arXiv 2402.03300, eq. 3).

    Args:
        logprobs: of the policy, with gradient.
        old: of the policy that sampled; none where it is this one (ratio exactly 1, gradient that of REINFORCE).
        reference: of the reference; none where `kl_weight` is zero.
        advantages: of the completions.
        weights: share of each token; see `objectives.masked`.
        clip: how far the ratio may fall below and rise above 1.
        kl_weight: beta.
    """
    logprobs = counted(logprobs, weights)
    ratio = importance_ratio(logprobs, logprobs if old is None else old)
    loss = weighted_sum(clipped_surrogate(ratio, advantages, *clip), weights)
    clipped = ((ratio < 1 - clip[0]) | (ratio > 1 + clip[1])).float()
    stats = {"ratio": weighted_sum(ratio, weights), "clip_fraction": weighted_sum(clipped, weights)}
    if reference is not None:
        divergence = weighted_sum(k3(logprobs, reference.detach()), weights)
        loss = loss + kl_weight * divergence
        stats["kl"] = divergence
    stats["entropy"] = weighted_sum(-logprobs, weights)  # its sampled estimate
    return LossOutput(loss=loss, stats={name: value.detach() for name, value in stats.items()})
