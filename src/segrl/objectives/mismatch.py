"""Correct for a rollout engine whose log-probabilities differ from those of the training pass."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from segrl.objectives.masked import counted


def truncated_importance(
    old: Float[Tensor, "N T"], drawn: Float[Tensor, "N T"], weights: Float[Tensor, "N T"], cap: float
) -> Float[Tensor, "N T"]:
    """Return the factor `min(π_old / π_engine, C)` of each token's surrogate.

    Truncated importance sampling (Ionides 2008), as TRL's `vllm_importance_sampling_correction`. Where the
    weight is 0, the ratio is 1.

    Args:
        old: log-probabilities under the policy that sampled, computed by the training pass.
        drawn: log-probabilities of the same tokens, computed by the engine that sampled them.
        weights: weight of each token in the loss; see `objectives.masked`.
        cap: C, so that a token that was improbable to the engine does not dominate the update.
    """
    return counted(old.detach() - drawn, weights).exp().clamp(max=cap)
