"""How much each token counts in the loss of one update.

The shares are made once for the whole update, before it is cut into parts, so a loss is a plain weighted sum and
the parts' losses add up to the whole's, however it is cut.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def per_sequence(mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""Mean over each completion's tokens, then over completions: \( 1 / (N\,|o_n|) \).

    GRPO (arXiv 2402.03300, eq. 3), TRL 0.14 and Seg-R1. Tokens of short completions count more. Completions
    without a token count nothing, and stay in N.
    """
    lengths = mask.sum(1, keepdim=True).clamp_min(1)
    return mask.float() / lengths / len(mask)


def per_token(mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""Mean over all tokens of the update: \( 1 / \sum_n |o_n| \) (DAPO, arXiv 2503.14476, eq. 12)."""
    return mask.float() / mask.sum().clamp_min(1)


def counted(values: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Values where they count, zero elsewhere: what does not count cannot enter a gradient, even if it is infinite."""
    return values.where(weights > 0, 0.0)


def weighted_sum(values: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> Float[Tensor, ""]:
    """Sum of values by their shares."""
    return (counted(values, weights) * weights).sum()
