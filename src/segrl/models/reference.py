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

    @property
    @abstractmethod
    def weights(self) -> nn.Module:
        """The module that `logprobs` reads."""

    @abstractmethod
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """As the policy's, float32 `[N, T]`, without gradient."""

    def made_for(self, passes: torch.dtype) -> None:
        """Lay the weights out for passes in that precision; there is nothing to lay out where the policy's own are used."""


class FrozenCopy(Reference):
    """A second copy of the weights.

    Args:
        policy: copied now, before any checkpoint is loaded.
    """

    def __init__(self, policy: HFPolicy) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy).requires_grad_(False).eval()

    @property
    def weights(self) -> nn.Module:
        """The copy."""
        return self.policy

    def made_for(self, passes: torch.dtype) -> None:
        """What every pass would cast is cast once: the numbers are the same, and take half the memory."""
        head = self.policy.model.lm_head  # in float32 in every pass
        for layer in self.policy.model.modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                layer.weight = nn.Parameter(layer.weight.to(passes), requires_grad=False)

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

    @property
    def weights(self) -> nn.Module:
        """The policy that learns."""
        return self.shared[0]

    @torch.no_grad()
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """As the policy's, float32 `[N, T]`, without gradient."""
        (policy,) = self.shared
        with policy.adapter_active(None):
            return policy.logprobs(prefixes, completions)
