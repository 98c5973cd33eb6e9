"""GRPO: advantages relative to the group, a clipped surrogate, and the divergence from the reference in the loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from segrl.models.hf_vlm import HFPolicy
from segrl.models.reference import FrozenCopy
from segrl.objectives.advantages import group_relative
from segrl.objectives.grpo import grpo
from segrl.protocols import Grammar, MaskHead, RolloutEngine
from segrl.rewards.mixture import RewardMixture
from segrl.stages.base import MakeOptimizer, MakeSchedule
from segrl.stages.policy_gradient import PolicyGradientStage
from segrl.types import Experience, LossOutput, Scores


class GRPOStage(PolicyGradientStage):
    """Group Relative Policy Optimization (arXiv 2402.03300).

    Args:
        kl_weight: beta; zero needs no reference and makes no pass for one.
        clip: how far the ratio may fall below and rise above 1.
        advantage_floor: added to a group's deviation.
        policy, grammar, head, engine, reward, reference, optimizer, schedule, max_grad_norm, seed, group_size,
            micro_batch_size, updates_per_rollout, epochs_per_rollout, token_weights: see `PolicyGradientStage`.

    Raises:
        ValueError: if a positive `kl_weight` has no reference to be measured against.
    """

    def __init__(
        self, policy: HFPolicy, grammar: Grammar, head: MaskHead, engine: RolloutEngine, reward: RewardMixture,
        reference: Callable[[HFPolicy], FrozenCopy] | None,
        optimizer: MakeOptimizer, schedule: MakeSchedule | None, max_grad_norm: float, seed: int,
        group_size: int, micro_batch_size: int, updates_per_rollout: int, epochs_per_rollout: int,
        token_weights: Callable[[Tensor], Tensor],
        kl_weight: float, clip: tuple[float, float], advantage_floor: float,
    ) -> None:  # fmt: skip
        if kl_weight > 0 and reference is None:
            raise ValueError(
                f"reference: frozen_copy is needed to measure a KL of weight {kl_weight}; got none"
            )
        super().__init__(
            policy, grammar, head, engine, reward, reference if kl_weight > 0 else None, optimizer, schedule,
            max_grad_norm, seed, group_size, micro_batch_size, updates_per_rollout, epochs_per_rollout, token_weights,
        )  # fmt: skip
        self.kl_weight, self.clip, self.advantage_floor = kl_weight, (clip[0], clip[1]), advantage_floor

    def advantages(self, scores: Scores) -> Tensor:
        """Relative to the group."""
        return group_relative(scores.total, self.advantage_floor)

    def objective(self, logprobs: Tensor, experience: Experience, weights: Tensor) -> LossOutput:
        """Clipped surrogate plus KL."""
        return grpo(
            logprobs, experience.old_logprobs, experience.reference_logprobs, experience.advantages, weights,
            self.clip, self.kl_weight,
        )  # fmt: skip
