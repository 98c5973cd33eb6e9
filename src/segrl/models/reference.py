"""The frozen policy that the KL term is measured against."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segrl.models.hf_vlm import HFPolicy
from segrl.types import Completions, Prefix


class FrozenCopy(nn.Module):
    """A second copy of the weights as they are when training begins; never in a checkpoint.

    Args:
        policy: copied now, before any checkpoint is loaded.
    """

    def __init__(self, policy: HFPolicy) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy).requires_grad_(False).eval()

    @torch.no_grad()
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """As the policy's, float32 `[N, T]`, without gradient."""
        return self.policy.logprobs(prefixes, completions)
