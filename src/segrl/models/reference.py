"""The frozen policy that a divergence is measured against."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segrl.models.hf_vlm import HFPolicy
from segrl.types import Completions, Prefix


class Reference(nn.Module):
    """The policy as it was when training began; never in a checkpoint."""

    @abstractmethod
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """As the policy's, float32 `[N, T]`, without gradient."""


class FrozenCopy(Reference):
    """A second copy of the weights.

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


class AdapterOff(Reference):
    """The policy itself with its adapter off: no second copy of the weights.

    Args:
        policy: has an adapter, and learns nothing else.

    Raises:
        ValueError: if it has none: then the policy with nothing off is the policy.
    """

    def __init__(self, policy: HFPolicy) -> None:
        super().__init__()
        if policy.lora is None:
            raise ValueError(
                "reference: adapter_off needs policy.lora; this policy has no adapter to turn off (reference=frozen_copy?)"
            )
        self.shared = (policy,)  # in a tuple: the stage owns its weights

    @torch.no_grad()
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """As the policy's, float32 `[N, T]`, without gradient."""
        (policy,) = self.shared
        with policy.speaking_with(None):
            return policy.logprobs(prefixes, completions)
