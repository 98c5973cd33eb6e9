"""Compute the policy's loss: a surrogate plus the divergence from the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from segrl.objectives.clipped import Surrogate
from segrl.objectives.masked import TokenWeights, counted, weighted_sum
from segrl.types import LossOutput

Divergence = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class MakeSurrogate(Protocol):
    """A function that computes a surrogate, such as those in `objectives.clipped`."""

    def __call__(self, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Surrogate:
        """Return the surrogate of each token; all tensors are `[N, T]`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """The terms of a policy gradient's loss: a surrogate and the divergence from a reference.

    Attributes:
        surrogate: loss of each token; see `objectives.clipped`.
        token_weights: weight of each token in an update; see `objectives.masked`.
        divergence: estimate of the divergence from the reference, per token; see `objectives.kl`.
        kl_weight: weight of the divergence in the loss.
        kl_reward: weight of the divergence that is subtracted from each token's reward. One of the two is 0.
        mismatch_cap: largest importance weight that corrects for the rounding of another engine that sampled;
            see `objectives.mismatch`. If None, there is no correction.

    Raises:
        ValueError: if both weights of the divergence are positive.
    """

    surrogate: MakeSurrogate
    token_weights: TokenWeights
    divergence: Divergence
    kl_weight: float
    kl_reward: float
    mismatch_cap: float | None

    def __post_init__(self) -> None:
        """Check the weights of the divergence."""
        if self.kl_weight > 0 and self.kl_reward > 0:
            raise ValueError(
                f"stage.kl_reward: must be 0 where stage.kl_weight is positive, and the other way round; "
                f"got {self.kl_reward} and {self.kl_weight}"
            )

    @property
    def needs_reference(self) -> bool:
        """True if `kl_weight` or `kl_reward` is positive, so that a reference must be loaded."""
        return self.kl_weight + self.kl_reward > 0


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
    """Return the loss `L = Σ_nt w[n,t] (c[n,t] S[n,t] + β D[n,t])` and its statistics.

    With `ppo_clip`, `k3` and `per_sequence` it is GRPO's (arXiv 2402.03300, eq. 3); with `per_group`,
    SAM-R1's (eq. 1).

    Args:
        logprobs: log-probabilities under the policy, with gradient.
        old: log-probabilities under the policy that sampled. If None, uses `logprobs`, detached: the ratio is
            1.
        reference: log-probabilities under the reference. If None, there is no divergence term and no `kl`
            statistic.
        advantages: one per token.
        weights: w, weight of each token in the loss; see `objectives.masked`.
        surrogate: computes S, the loss of each token.
        divergence: computes D, the divergence from the reference per token; see `objectives.kl`.
        kl_weight: β. If 0, the divergence is logged but not added to the loss.
        correction: c, factor of each token's surrogate; see `objectives.mismatch`. If None, c is 1.
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
        "entropy": weighted_sum(-logprobs, weights),  # estimate from the sampled tokens
        "drift": weighted_sum(before - logprobs, weights),  # k1 estimate of KL(π_old‖π)
    }
    if reference is not None:
        kl = weighted_sum(divergence(logprobs, counted(reference.detach(), weights)), weights)
        loss = loss + kl_weight * kl if kl_weight > 0 else loss  # 0 * inf is NaN
        stats["kl"] = kl
    return LossOutput(loss=loss, stats={name: value.detach() for name, value in stats.items()})
