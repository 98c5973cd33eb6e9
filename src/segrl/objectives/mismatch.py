"""Tokens drawn by one engine and learned by another: their log-probabilities differ by rounding, or by more."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from segrl.objectives.masked import counted


def truncated_importance(
    old: Float[Tensor, "N T"], drawn: Float[Tensor, "N T"], weights: Float[Tensor, "N T"], cap: float
) -> Float[Tensor, "N T"]:
    r"""What a token's surrogate is worth, \( \min(\pi_{old}(t) / \pi_{drawn}(t), C) \): truncated importance sampling, by token.

    Truncated importance sampling (Ionides 2008), as TRL's `vllm_importance_sampling_correction`.

    Args:
        old: log-probabilities of the policy that sampled, by the training pass.
        drawn: by the engine that drew the tokens.
        weights: share of each token; see `objectives.masked`.
        cap: C, so that a token that the engine thought unlikely does not rule the update.
    """
    return counted(old.detach() - drawn, weights).exp().clamp(max=cap)
