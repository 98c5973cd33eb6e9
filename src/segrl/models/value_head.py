"""Critics: estimate the reward of a completion before each of its tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segrl.models.hf_vlm import Lora
from segrl.protocols import AdaptablePolicy, TrainablePolicy
from segrl.types import Completions, Prefix


class ValueHead(nn.Module):
    """Maps hidden states to values in float32; every value is `prior` at initialisation.

    Args:
        width: of the hidden states.
        insight: number of privileged inputs beside the hidden states; may be 0.
        prior: expected reward.
    """

    def __init__(self, width: int, insight: int, prior: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width + insight, width), nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, prior)

    def forward(self, hidden: Tensor, insight: Tensor | None) -> Tensor:
        """Return values `[N, T]` of hidden states `[N, T, D]` and privileged inputs `[N, I]` or None."""
        with torch.autocast(hidden.device.type, enabled=False):
            seen = self.norm(hidden.float())
            if insight is not None:
                seen = torch.cat([seen, insight[:, None].expand(-1, seen.shape[1], -1).to(seen)], -1)
            values: Tensor = self.outer(nn.functional.silu(self.inner(seen)))[..., 0]
        return values


class Critic(nn.Module):
    """Base of critics, which estimate values from hidden states of a policy.

    Args:
        policy: the policy.
        insight: see `ValueHead`.
        prior: see `ValueHead`.
    """

    def __init__(self, policy: TrainablePolicy, insight: int, prior: float) -> None:
        super().__init__()
        self.head = ValueHead(policy.hidden_size, insight, prior)
        self.insight = insight

    @abstractmethod
    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """Return values `[N, T]`, each estimated before its token.

        Args:
            hidden: `[N, T, D]`, from the policy's `read`.
            prefixes: B prefixes.
            completions: N completions.
            insight: `[N, I]`, privileged inputs, or None.
        """


class DetachedCritic(Critic):
    """A head on detached hidden states of the policy: cheapest, and its loss does not train the policy."""

    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """Return values `[N, T]`; see `Critic`."""
        values: Tensor = self.head(hidden.detach(), insight)
        return values


class SharedCritic(Critic):
    """A head on hidden states that are not detached: its loss also trains the policy's layers.

    The stage's `value_weight` should then be small, such as 0.1.
    """

    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """Return values `[N, T]`; see `Critic`."""
        values: Tensor = self.head(hidden, insight)
        return values


class AdapterCritic(Critic):
    """A head on hidden states of its own, which a second adapter makes from the policy's frozen weights.

    Args:
        policy: has an adapter, too.
        insight, prior: see `ValueHead`.
        lora: of the second adapter.

    Raises:
        ValueError: if the policy has no adapter, because then the weights below the critic are trained, or
            if it uses gradient checkpointing.
    """

    def __init__(self, policy: AdaptablePolicy, insight: int, prior: float, lora: Lora) -> None:
        if policy.lora is None:
            raise ValueError(
                "policy.lora: must be set for a critic with its own adapter; got null (or set stage.critic)"
            )
        # The backward pass would recompute with the policy's adapter active, not the critic's.
        if policy.gradient_checkpointing:
            raise ValueError(
                "policy.gradient_checkpointing: must be false for a critic with its own adapter; got true"
            )
        super().__init__(policy, insight, prior)
        policy.add_adapter("critic", lora)
        policy.activate_policy_adapter()
        self.shared = (policy,)  # in a tuple, so that its weights are not registered here a second time

    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """Return values `[N, T]`; see `Critic`. `hidden` is not used."""
        (policy,) = self.shared
        with policy.adapter_active("critic"):
            values: Tensor = self.head(policy.read(prefixes, completions), insight)
        return values
