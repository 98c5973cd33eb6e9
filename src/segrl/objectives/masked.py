"""Compute each token's weight (its share) in the loss of one update.

The weights are computed once per update, before it is split into micro-batches. So the loss is a weighted
sum, and the losses of the micro-batches add up to that of the update.

Each weighting is a function of (loss mask, group size, tokens). `tokens` is the number of true entries of the
loss mask in the update, as a mean over ranks. N and B count the completions and samples of one rank. Ranks
average their gradients, so the gradient does not depend on the number of ranks.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class TokenWeights(Protocol):
    """A weighting of tokens, such as the functions of this module."""

    def __call__(self, mask: Tensor, group_size: int, tokens: float) -> Tensor:
        """Return the weight of each token, `[N, T]`, from the loss mask."""
        ...


def per_sequence(mask: Bool[Tensor, "N T"], group_size: int, tokens: float) -> Float[Tensor, "N T"]:
    """Return `1 / (N |o_n|)`: the mean over each completion's tokens, then over completions.

    GRPO (arXiv 2402.03300, eq. 3), TRL 0.14 and Seg-R1. Tokens of short completions weigh more. Completions
    without a token in the loss mask add nothing to the loss, but are counted in N.
    """
    lengths = mask.sum(1, keepdim=True).clamp_min(1)
    return mask.float() / lengths / len(mask)


def per_token(mask: Bool[Tensor, "N T"], group_size: int, tokens: float) -> Float[Tensor, "N T"]:
    """Return `1 / tokens`: the mean over all tokens of the update (`token-mean` of EasyR1 and verl).

    Args:
        mask: loss mask.
        group_size: completions per sample; not used.
        tokens: tokens of the update in the loss mask, mean over ranks.
    """
    return mask.float() / (tokens if tokens > 0 else 1.0)


def per_group(mask: Bool[Tensor, "N T"], group_size: int, tokens: float) -> Float[Tensor, "N T"]:
    """Return `1 / (B Σ_g |o_bg|)`: the mean over the tokens of each group, then over groups.

    DAPO (arXiv 2503.14476, eq. 8) and SAM-R1 (eq. 1); the expectation in both is over samples.
    """
    groups = mask.view(len(mask) // group_size, group_size, -1)
    counts = groups.sum((1, 2), keepdim=True).clamp_min(1)
    return (groups.float() / counts / len(groups)).view_as(mask)


def per_budget(
    mask: Bool[Tensor, "N T"], group_size: int, tokens: float, *, budget: int
) -> Float[Tensor, "N T"]:
    """Return `1 / (N budget)`: a constant, so no bias by length (Dr.GRPO, arXiv 2503.20783, section 3.2).

    Args:
        mask: loss mask.
        group_size: completions per sample; not used.
        tokens: tokens of the update in the loss mask; not used.
        budget: largest number of tokens of a completion.
    """
    return mask.float() / (len(mask) * budget)


def counted(values: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return the values where the weight is positive, and zero elsewhere.

    An infinite or NaN value of weight zero therefore does not reach the loss or its gradient.
    """
    return values.where(weights > 0, 0.0)


def weighted_sum(values: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> Float[Tensor, ""]:
    """Return the sum of the values times their weights."""
    return (counted(values, weights) * weights).sum()
