"""The clipped surrogate."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def importance_ratio(logprobs: Float[Tensor, "N T"], old: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    r"""\( \rho = \pi / \pi_{old} \); its log is held within 20 so that a mismatch cannot overflow."""
    return (logprobs - old.detach()).clamp(-20.0, 20.0).exp()


def clipped_surrogate(
    ratio: Float[Tensor, "N T"], advantages: Float[Tensor, "N"], low: float, high: float
) -> Float[Tensor, "N T"]:
    r"""\( -\min(\rho A,\ \mathrm{clip}(\rho, 1-low, 1+high)\, A) \) (PPO, arXiv 1707.06347, eq. 7; bounds apart: DAPO, eq. 10)."""
    gain = advantages.detach()[:, None]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)
