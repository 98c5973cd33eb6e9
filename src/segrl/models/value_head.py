"""Critics: what the reward of a completion will be, expected before each of its tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segrl.models.hf_vlm import HFPolicy, Lora
from segrl.types import Completions, Prefix


class ValueHead(nn.Module):
    """Hidden states to values, in float32; says `prior` until it learns.

    Args:
        width: of the hidden states.
        insight: number of facts it is told beside them; 0 tells it nothing.
        prior: expected reward.
    """

    def __init__(self, width: int, insight: int, prior: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width + insight, width), nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, prior)

    def forward(self, hidden: Tensor, insight: Tensor | None) -> Tensor:
        """`[N, T, D]` and `[N, I]` to `[N, T]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            seen = self.norm(hidden.float())
            if insight is not None:
                seen = torch.cat([seen, insight[:, None].expand(-1, seen.shape[1], -1).to(seen)], -1)
            values: Tensor = self.outer(nn.functional.silu(self.inner(seen)))[..., 0]
        return values


class Critic(nn.Module):
    """Values of the states that a policy went through.

    Args:
        policy: whose hidden states are valued.
        insight: see `ValueHead`.
        prior: see `ValueHead`.
    """

    def __init__(self, policy: HFPolicy, insight: int, prior: float) -> None:
        super().__init__()
        self.head = ValueHead(policy.model.config.get_text_config().hidden_size, insight, prior)
        self.insight = insight

    @abstractmethod
    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """Values `[N, T]`, each expected before its token; `hidden` is what the policy's own `read` gave."""


class DetachedCritic(Critic):
    """A head on the policy's hidden states, which it does not move: cheapest, and no interference."""

    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """See `Critic`."""
        values: Tensor = self.head(hidden.detach(), insight)
        return values


class SharedCritic(Critic):
    """A head whose loss also moves the policy's trunk; weigh it low."""

    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """See `Critic`."""
        values: Tensor = self.head(hidden, insight)
        return values


class AdapterCritic(Critic):
    """A second adapter and a head on the same frozen weights: a trunk of its own without a second model.

    Args:
        policy: has an adapter itself.
        insight, prior: see `ValueHead`.
        lora: of the second adapter.

    Raises:
        ValueError: if the policy has none: then its weights, which the critic would stand on, learn; or if it recomputes activations.
    """

    def __init__(self, policy: HFPolicy, insight: int, prior: float, lora: Lora) -> None:
        if policy.lora is None:
            raise ValueError(
                "stage.critic: a critic with its own adapter needs policy.lora; this policy has none"
            )
        if (
            policy.gradient_checkpointing
        ):  # what is computed again in the backward pass would be so with the policy's adapter
            raise ValueError(
                "policy.gradient_checkpointing: false is needed by a critic with its own adapter; got true"
            )
        super().__init__(policy, insight, prior)
        policy.add_adapter("critic", lora)
        policy.activate_policy_adapter()
        self.shared = (policy,)  # in a tuple: the stage owns its weights

    def forward(
        self, hidden: Tensor, prefixes: Sequence[Prefix], completions: Completions, insight: Tensor | None
    ) -> Tensor:
        """See `Critic`."""
        (policy,) = self.shared
        with policy.adapter_active("critic"):
            values: Tensor = self.head(policy.read(prefixes, completions), insight)
        return values
