"""Estimators of the divergence from a reference, token by token (Schulman, "Approximating KL divergence", 2020)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def k3(logprobs: Float[Tensor, "N T"], reference: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""\( e^{d} - d - 1 \) with \( d = \log\pi_{ref} - \log\pi \): unbiased, never negative, low variance."""
    difference = reference - logprobs
    return difference.exp() - difference - 1
