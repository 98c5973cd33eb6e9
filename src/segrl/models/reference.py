"""The frozen policy against which the KL divergence is measured."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from segrl.protocols import AdaptablePolicy, TrainablePolicy
from segrl.types import Completions, Prefix


class Reference(nn.Module):
    """The policy as it was when training started; it never enters a checkpoint."""

    @property
    @abstractmethod
    def weights(self) -> nn.Module:
        """The module whose weights `logprobs` uses."""

    @abstractmethod
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """Return the log-probability of each completion token, float32 `[N, T]`, without gradient."""

    def made_for(self, passes: torch.dtype) -> None:
        """Prepare the weights for passes in that dtype. By default, do nothing."""


class FrozenCopy(Reference):
    """A second copy of the weights.

    Args:
        policy: a module, copied at construction, before any checkpoint is loaded.
    """

    def __init__(self, policy: TrainablePolicy) -> None:
        super().__init__()
        copied: Any = copy.deepcopy(policy)
        self.policy = copied.requires_grad_(False).eval()

    @property
    def weights(self) -> nn.Module:
        """The copied policy."""
        return cast("nn.Module", self.policy)

    def made_for(self, passes: torch.dtype) -> None:
        """Cast linear layers' weights once; autocast would cast them in every pass, to the same values."""
        head = self.policy.output_layer  # stays as it is, because log-probabilities use it in float32
        for layer in self.policy.modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                layer.weight = nn.Parameter(layer.weight.to(passes), requires_grad=False)

    @torch.no_grad()
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """Return the log-probability of each completion token, float32 `[N, T]`, without gradient."""
        return cast("Tensor", self.policy.logprobs(prefixes, completions))


class AdapterOff(Reference):
    """The policy itself with its adapter off: no second copy of the weights.

    Args:
        policy: has an adapter, and only that is trained.

    Raises:
        ValueError: if it has no adapter, because then it would be its own reference.
    """

    def __init__(self, policy: AdaptablePolicy) -> None:
        super().__init__()
        if policy.lora is None:
            raise ValueError(
                "reference: must be frozen_copy, or reference=none, without policy.lora; got adapter_off, "
                "which turns an adapter off"
            )
        self.shared = (policy,)  # in a tuple, so that its weights are not registered here a second time

    @property
    def weights(self) -> nn.Module:
        """The policy being trained."""
        return cast("nn.Module", self.shared[0])

    @torch.no_grad()
    def logprobs(self, prefixes: Sequence[Prefix], completions: Completions) -> Tensor:
        """Return the log-probability of each completion token, float32 `[N, T]`, without gradient."""
        (policy,) = self.shared
        with policy.adapter_active(None):
            return policy.logprobs(prefixes, completions)
