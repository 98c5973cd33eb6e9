"""The loss of the policy: a surrogate, and the divergence from the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from segrl.objectives.clipped import Surrogate
from segrl.objectives.masked import counted, weighted_sum
from segrl.types import LossOutput

Divergence = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class MakeSurrogate(Protocol):
    """See `objectives.clipped`."""

    def __call__(self, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Surrogate:
        """All `[N, T]`."""
        ...


def policy_gradient(
    logprobs: Float[Tensor, "N T"],
    old: Float[Tensor, "N T"] | None,
    reference: Float[Tensor, "N T"] | None,
    advantages: Float[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    surrogate: MakeSurrogate,
    divergence: Divergence,
    kl_weight: float,
    correction: Float[Tensor, "N T"] | None = None,
) -> LossOutput:
    r"""\( L = \sum_{nt} w_{nt} [ S_{nt} + \beta D_{nt} ] \).

    With `ppo_clip`, `k3` and `per_sequence` it is GRPO's (arXiv 2402.03300, eq. 3); with `per_group`, SAM-R1's (eq. 1).

    Args:
        logprobs: of the policy, with gradient.
        old: of the policy that sampled; none where it is this one (ratio exactly 1, gradient that of REINFORCE).
        reference: of the reference; none where nothing measures a divergence.
        advantages: of the tokens.
        weights: share of each token; see `objectives.masked`.
        surrogate: what a token's step is worth.
        divergence: from the reference, per token.
        correction: factor of each token's surrogate, where another engine sampled; see `objectives.mismatch`.
        kl_weight: beta; zero logs the divergence without adding it.
    """
    logprobs = counted(logprobs, weights)
    before = logprobs.detach() if old is None else counted(old, weights)
    term = surrogate(logprobs, before, advantages, weights > 0)
    loss = weighted_sum(term.loss if correction is None else term.loss * correction, weights)
    clipped, ratio = term.clipped.float(), term.ratio.detach()
    stats = {
        "ratio": weighted_sum(ratio, weights),
        "clip_low": weighted_sum(clipped * (ratio < 1), weights),
        "clip_high": weighted_sum(clipped * (ratio > 1), weights),
        "entropy": weighted_sum(-logprobs, weights),  # its sampled estimate
        "drift": weighted_sum(before - logprobs, weights),  # divergence from the policy that sampled
    }
    if reference is not None:
        kl = weighted_sum(divergence(logprobs, counted(reference.detach(), weights)), weights)
        loss = loss + kl_weight * kl if kl_weight > 0 else loss  # zero times infinity is no number
        stats["kl"] = kl
    return LossOutput(loss=loss, stats={name: value.detach() for name, value in stats.items()})
