r"""Advantages from a critic: generalised advantage estimation (arXiv 1506.02438), with a decay of its own at each token.

A decay \( \lambda_{nt} \) per token makes all variants one function: constant (token level), 1 inside a segment and below 1 where it
closes (segment level, the bi-level GAE of VAGEN), a constant by the completion's length (VAPO). Decoupled GAE (VC-PPO,
arXiv 2503.01491) calls it twice: one decay for the policy's advantages, 1 for the critic's targets.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    rewards: Float[Tensor, "N T"], values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], decay: Float[Tensor, "N T"],
    discount: float,
) -> Float[Tensor, "N T"]:  # fmt: skip
    r"""\( A_t = \delta_t + \gamma\lambda_t A_{t+1} \) with \( \delta_t = r_t + \gamma V_{t+1} - V_t \) (eq. 16); nothing follows the last token.

    Args:
        rewards: of the tokens.
        values: of the state in which each token was chosen.
        mask: true on the completion, a run from the left.
        decay: how much of the advantage after each token counts for it.
        discount: gamma.
    """
    values = values.masked_fill(~mask, 0.0)  # beyond the end there is no value: never bootstrap past it
    following = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    delta = (rewards + discount * following - values).masked_fill(~mask, 0.0)
    advantages, after = torch.zeros_like(delta), delta.new_zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        after = delta[:, t] + discount * decay[:, t] * after
        advantages[:, t] = after
    return advantages


def constant_decay(
    mask: Bool[Tensor, "N T"], closes: Bool[Tensor, "N T"], *, decay: float
) -> Float[Tensor, "N T"]:
    """The same at every token. `closes` is unused."""
    return torch.full(mask.shape, decay, device=mask.device)


def segment_decay(
    mask: Bool[Tensor, "N T"], closes: Bool[Tensor, "N T"], *, decay: float
) -> Float[Tensor, "N T"]:
    """Only where a segment closes, so that credit reaches the thought in front of it undiminished.

    Args:
        mask: true on the completion.
        closes: tokens that close a box or a point.
        decay: at these.
    """
    return torch.where(closes, decay, 1.0)


def length_decay(
    mask: Bool[Tensor, "N T"], closes: Bool[Tensor, "N T"], *, alpha: float
) -> Float[Tensor, "N T"]:
    r"""\( 1 - 1/(\alpha\,|o_n|) \): longer completions decay less (VAPO, arXiv 2504.05118, eq. 10). `closes` is unused."""
    lengths = mask.sum(1, keepdim=True).clamp_min(1)
    return (1 - 1 / (alpha * lengths)).clamp_min(0.0).expand(mask.shape)
