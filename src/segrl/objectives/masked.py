"""How much each token counts in the loss of one update.

The shares are made once for the whole update, before it is cut into parts, so a loss is a plain weighted sum and
the parts' losses add up to the whole's, however it is cut. Ranks average their gradients; so shares are made of
what an update holds on the mean of the ranks, and any number of them makes the same gradient.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def per_sequence(mask: Bool[Tensor, "N T"], group_size: int, tokens: float) -> Float[Tensor, "N T"]:
    r"""Mean over each completion's tokens, then over completions: \( 1 / (N\,|o_n|) \).

    GRPO (arXiv 2402.03300, eq. 3), TRL 0.14 and Seg-R1. Tokens of short completions count more. Completions
    without a token count nothing, and stay in N.
    """
    lengths = mask.sum(1, keepdim=True).clamp_min(1)
    return mask.float() / lengths / len(mask)


def per_token(mask: Bool[Tensor, "N T"], group_size: int, tokens: float) -> Float[Tensor, "N T"]:
    r"""Mean over all tokens of the update: \( 1 / \sum_n |o_n| \) (EasyR1's and verl's `token-mean`).

    Args:
        mask: tokens that count.
        group_size: completions per sample.
        tokens: that count in the whole update, mean over ranks.
    """
    return mask.float() / (tokens if tokens > 0 else 1.0)


def per_group(mask: Bool[Tensor, "N T"], group_size: int, tokens: float) -> Float[Tensor, "N T"]:
    r"""Mean over the tokens of each group, then over groups: \( 1 / (B \sum_{g} |o_{bg}|) \).

    DAPO (arXiv 2503.14476, eq. 8) and SAM-R1 (eq. 1), whose expectation is over samples.
    """
    groups = mask.view(len(mask) // group_size, group_size, -1)
    counts = groups.sum((1, 2), keepdim=True).clamp_min(1)
    return (groups.float() / counts / len(groups)).view_as(mask)


def per_budget(
    mask: Bool[Tensor, "N T"], group_size: int, tokens: float, *, budget: int
) -> Float[Tensor, "N T"]:
    r"""Sum over tokens by a constant: \( 1 / (N\,budget) \), so length biases nothing (Dr.GRPO, arXiv 2503.20783, 3.2).

    Args:
        mask: tokens that count.
        group_size: completions per sample.
        tokens: of the update.
        budget: most tokens of a completion.
    """
    return mask.float() / (len(mask) * budget)


def counted(values: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Values where they count, zero elsewhere: what does not count cannot enter a gradient, even if it is infinite."""
    return values.where(weights > 0, 0.0)


def weighted_sum(values: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> Float[Tensor, ""]:
    """Sum of values by their shares."""
    return (counted(values, weights) * weights).sum()
