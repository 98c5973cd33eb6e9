r"""Estimators of the divergence from a reference, token by token (Schulman, "Approximating KL divergence", 2020).

With \( d = \log\pi_{ref} - \log\pi \). In the loss, take k3 (never negative, and its gradient is the one that is wanted);
in the reward, k1, whose expectation is the divergence.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "N T"], reference: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""\( -d \): unbiased, of high variance, negative half of the time. As a loss its gradient is zero on average."""
    return logprobs - reference


def k2(logprobs: Float[Tensor, "N T"], reference: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""\( d^2 / 2 \): biased, of low variance, never negative."""
    return (logprobs - reference).square() / 2


def k3(logprobs: Float[Tensor, "N T"], reference: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""\( e^{d} - d - 1 \): unbiased, of low variance, never negative."""
    difference = reference - logprobs
    return difference.exp() - difference - 1
