"""With a critic: Proximal Policy Optimization, as an extension of SAM-R1 that the paper does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from segrl.geometry import tight_box
from segrl.models.hf_vlm import HFPolicy
from segrl.models.value_head import Critic
from segrl.objectives.gae import gae
from segrl.objectives.policy_gradient import Divergence, MakeSurrogate
from segrl.objectives.ppo import clipped_value_loss, explained_variance, whiten
from segrl.protocols import Grammar, MaskHead, RolloutEngine, Unfolding
from segrl.rewards.mixture import RewardMixture
from segrl.rollout.shaping import PromptShaping
from segrl.stages.base import MakeOptimizer, MakeSchedule
from segrl.stages.policy_gradient import MakeReference, PolicyGradientStage, Rollout, TokenWeights
from segrl.stages.zero import ZeRO
from segrl.types import Batch, Completions, Experience, LossOutput


class Decay(Protocol):
    """See `objectives.gae`."""

    def __call__(self, mask: Tensor, closes: Tensor) -> Tensor:
        """Decay after each token, `[N, T]`."""
        ...


class PPOStage(PolicyGradientStage):
    """PPO (arXiv 1707.06347): a critic's expectation is the baseline, token by token.

    Args:
        critic: makes the critic from the policy; see `models.value_head`.
        critic_lr: its learning rate.
        critic_warmup: updates in which only the critic learns.
        shaping: rewards each box and point as it closes; none rewards the whole answer at its end.
        decay: of the policy's advantages; see `objectives.gae`.
        critic_decay: of the critic's targets; 1 is what the rest of the completion really earned.
        discount: of later rewards.
        value_clip: how far one update may move a value; see `objectives.ppo`.
        value_weight: of the critic's loss.
        policy, grammar, head, engine, reward, reference, optimizer, schedule, max_grad_norm, seed, group_size,
            micro_batch_size, completions_per_pass, updates_per_rollout, epochs_per_rollout, surrogate, token_weights,
            divergence, kl_weight,
            kl_reward, mismatch_cap: see `PolicyGradientStage`.
    """

    def __init__(
        self, policy: HFPolicy, grammar: Grammar, head: MaskHead, engine: RolloutEngine, reward: RewardMixture,
        reference: MakeReference | None,
        optimizer: MakeOptimizer, schedule: MakeSchedule | None, max_grad_norm: float, seed: int,
        group_size: int, micro_batch_size: int, completions_per_pass: int | None, updates_per_rollout: int, epochs_per_rollout: int,
        surrogate: MakeSurrogate, token_weights: TokenWeights, divergence: Divergence, kl_weight: float, kl_reward: float,
        mismatch_cap: float | None,
        critic: Callable[[HFPolicy], Critic], critic_lr: float, critic_warmup: int, shaping: PromptShaping | None,
        decay: Decay, critic_decay: float, discount: float, value_clip: float, value_weight: float,
    ) -> None:  # fmt: skip
        super().__init__(
            policy, grammar, head, engine, reward, reference, optimizer, schedule, max_grad_norm, seed, group_size,
            micro_batch_size, completions_per_pass, updates_per_rollout, epochs_per_rollout, surrogate, token_weights, divergence,
            kl_weight, kl_reward, mismatch_cap,
        )  # fmt: skip
        self.critic = critic(policy)
        self.critic_lr, self.critic_warmup, self.shaping = critic_lr, critic_warmup, shaping
        self.decay, self.critic_decay, self.discount = decay, critic_decay, discount
        self.value_clip, self.value_weight = value_clip, value_weight

    def _sides(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What learns of the policy, and of the critic (an adapter of its own lies among the policy's modules)."""
        policy: list[nn.Parameter] = []
        critic = [p for p in self.critic.parameters() if p.requires_grad]
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                (critic if ".critic." in name else policy).append(parameter)
        return policy, critic

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """Two groups: the critic has a learning rate of its own."""
        policy, critic = self._sides()
        groups: list[dict[str, Any]] = [{"params": policy}, {"params": critic, "lr": self.critic_lr}]
        return self.scheduled(self.make_optimizer(groups))

    def on_fit_start(self) -> None:
        """Raises ValueError for a warm-up under ZeRO, whose optimizer cannot rest for a part of the weights."""
        super().on_fit_start()
        if self.critic_warmup > 0 and isinstance(self.trainer.strategy, ZeRO):
            raise ValueError(
                f"stage.critic_warmup: 0 is needed under ZeRO, which steps all weights; got {self.critic_warmup} (or trainer=ddp)"
            )

    @torch.no_grad()
    def as_sampled(self, batch: Batch, completions: Completions) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities and values, from one pass."""
        privileged = self.privileged(batch)
        group, size = self.group_size, self.micro_batch_size
        logprobs, values = [], []
        for b in range(0, len(batch), size):
            rows = slice(b * group, (b + size) * group)
            prefixes, part = batch.prefixes[b : b + size], completions.rows(rows)
            hidden = self.policy.read(prefixes, part)
            logprobs.append(self.policy.logprobs_of(hidden, part))
            values.append(
                self.critic(hidden, prefixes, part, None if privileged is None else privileged[rows])
            )
        return torch.cat(logprobs), torch.cat(values).masked_fill(~completions.mask, 0.0)

    def privileged(self, batch: Batch) -> Tensor | None:
        """The truth's box and area, `[N, 5]`, for a critic that is told it; the policy never is."""
        if self.critic.insight == 0:
            return None
        facts = [
            [*(tight_box(s.mask).tolist() if s.mask.any() else [0.0] * 4), s.mask.mean()]
            for s in batch.samples
        ]
        return torch.tensor(facts, device=self.device).repeat_interleave(self.group_size, 0)

    def credit(self, experience: Experience, rollout: Rollout) -> Experience:
        """Advantages by GAE, whitened over the update; returns with a decay of their own (arXiv 2503.01491)."""
        batch, completions, answers, _ = rollout
        rewards, mask = self.rewards(experience, rollout), completions.mask
        closes = torch.zeros_like(mask)
        if self.shaping is not None:
            assert isinstance(self.grammar, Unfolding), "runs.checks asks for a grammar that says steps"
            with self.whole_weights(self.head):
                shaped, closes = self.shaping(
                    self.grammar, self.head, self.policy.encoder, batch, completions, answers
                )
            rewards = rewards + shaped.to(rewards)
            closes = closes.to(mask.device)
        values = experience.values
        assert values is not None
        advantages = gae(rewards, values, mask, self.decay(mask=mask, closes=closes), self.discount)
        ahead = gae(rewards, values, mask, torch.full_like(values, self.critic_decay), self.discount)
        returns = ahead + values
        return replace(
            experience,
            advantages=self._whitened(advantages, mask).masked_fill(~mask, 0.0),
            returns=returns,
            privileged=self.privileged(batch),
        )

    def _whitened(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """By mean and deviation of all ranks' tokens."""
        known = advantages[mask]
        moments = torch.stack([torch.tensor(float(len(known))).to(known), known.sum(), known.square().sum()])
        count, total, squares = self.over_ranks(moments).unbind()
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        return whiten(advantages, float(mean), float(deviation))

    def objective(self, part: Experience, weights: Tensor) -> LossOutput:
        """The policy's loss and the critic's, from one pass; during the warm-up the policy's does not move it."""
        assert part.values is not None and part.returns is not None
        hidden = self.policy.read(part.prefixes, part.completions, part.state)
        actor = self.policy_objective(self.policy.logprobs_of(hidden, part.completions), part, weights)
        values = self.critic(hidden, part.prefixes, part.completions, part.privileged)
        judged = clipped_value_loss(values, part.values, part.returns, weights, self.value_clip)
        return LossOutput(
            loss=actor.loss + self.value_weight * judged.loss,
            stats={**actor.stats, **{f"critic/{name}": value for name, value in judged.stats.items()}},
        )

    def tame_gradients(self) -> dict[str, Tensor]:
        """Each side by its own norm; in the warm-up the policy has no gradient at all, so its optimizer state stays new."""
        policy, critic = self._sides()
        norms = {
            "policy/grad_norm": self.clip(policy),
            "critic/grad_norm": self.clip(critic),
        }
        if self.global_step < self.critic_warmup:
            for parameter in policy:
                parameter.grad = None
        return norms

    def credit_stats(self, experience: Experience) -> dict[str, Tensor | float]:
        """How much the critic knew."""
        assert experience.values is not None and experience.returns is not None
        mask = experience.completions.mask
        known = explained_variance(experience.values, experience.returns, mask)
        return {"critic/explained_variance": known, "critic/value": experience.values[mask].mean()}
