"""Estimate the divergence KL(π‖π_ref) per token (Schulman, "Approximating KL divergence", 2020).

Below, `d = log π_ref - log π`. k1 suits the reward: its expectation is the divergence. k3 suits the loss:
GRPO uses it (arXiv 2402.03300, eq. 4), and it is never negative. For tokens sampled from π, the expected
gradient of k2 is that of KL(π‖π_ref), and the expected gradient of k3 is that of KL(π_ref‖π):

    E[∇k3] = E[(1 - π_ref/π) ∇log π] = -Σ π_ref ∇log π
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "N T"], reference: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return `-d`: unbiased, high variance, often negative. As a loss its expected gradient is zero."""
    return logprobs - reference


def k2(logprobs: Float[Tensor, "N T"], reference: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return `d² / 2`: biased, low variance, never negative."""
    return (logprobs - reference).square() / 2


def k3(logprobs: Float[Tensor, "N T"], reference: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return `exp(d) - d - 1`: unbiased, low variance, never negative."""
    difference = reference - logprobs
    return difference.exp() - difference - 1
