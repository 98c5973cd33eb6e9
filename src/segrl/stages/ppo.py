"""Proximal Policy Optimization with a critic: segrl's extension of SAM-R1, which the paper does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from segrl.geometry import tight_box
from segrl.models.value_head import Critic
from segrl.objectives.gae import Decay, gae
from segrl.objectives.policy_gradient import PolicyGradient
from segrl.objectives.ppo import clipped_value_loss, explained_variance, whiten
from segrl.protocols import Unfolding
from segrl.rewards.mixture import RewardMixture
from segrl.rollout.shaping import PromptShaping
from segrl.segmenter import Segmenter
from segrl.stages.base import Optimization
from segrl.stages.policy_gradient import Loop, MakeReference, PolicyGradientStage
from segrl.stages.scored_rollout import ScoredRollout
from segrl.types import Batch, Completions, Experience, LossOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticLearning:
    """How the critic is trained.

    Attributes:
        critic_lr: learning rate.
        critic_warmup: number of first updates in which only the critic is trained.
        critic_decay: GAE decay of its targets; 1 gives the returns of the completion.
        value_clip: largest change of a value in one update; see `objectives.ppo`.
        value_weight: weight of its loss.
    """

    critic_lr: float
    critic_warmup: int
    critic_decay: float
    value_clip: float
    value_weight: float


class PPOStage(PolicyGradientStage):
    """PPO (arXiv 1707.06347): the baseline of each token is a critic's value.

    Args:
        segmenter, reward, reference, objective, loop, optimization, seed: see `PolicyGradientStage`.
        critic: makes the critic from the policy; see `models.value_head`.
        learning: how the critic is trained.
        shaping: rewards each box and point where it closes. If None, the reward comes at the last token.
        decay: GAE decay of the policy's advantages, per token; see `objectives.gae`.
        discount: of later rewards.
    """

    def __init__(
        self,
        *,
        segmenter: Segmenter,
        reward: RewardMixture,
        reference: MakeReference | None,
        objective: PolicyGradient,
        loop: Loop,
        optimization: Optimization,
        seed: int,
        critic: Callable[[Any], Critic],
        learning: CriticLearning,
        shaping: PromptShaping | None,
        decay: Decay,
        discount: float,
    ) -> None:
        super().__init__(
            segmenter=segmenter, reward=reward, reference=reference, objective=objective, loop=loop,
            optimization=optimization, seed=seed,
        )  # fmt: skip
        self.critic = critic(self.policy)
        self.learning, self.shaping, self.decay, self.discount = learning, shaping, decay, discount

    def _sides(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the trained parameters of the policy and of the critic.

        A critic's own adapter is part of the policy's modules; its parameters have ".critic." in their names.
        """
        policy: list[nn.Parameter] = []
        critic = [p for p in self.critic.parameters() if p.requires_grad]
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                (critic if ".critic." in name else policy).append(parameter)
        return policy, critic

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """Return the optimizer of two parameter groups: the critic's has its own learning rate."""
        policy, critic = self._sides()
        groups: list[dict[str, Any]] = [{"params": policy}, {"params": critic, "lr": self.learning.critic_lr}]
        return self.scheduled(self.optimization.optimizer(groups))

    def on_fit_start(self) -> None:
        """Raise ValueError for a warm-up under ZeRO, whose optimizer always steps all weights."""
        super().on_fit_start()
        if self.learning.critic_warmup > 0 and not self.sharding.partial_updates:
            raise ValueError(
                f"stage.critic_warmup: must be 0 where the strategy steps all weights (ZeRO); "
                f"got {self.learning.critic_warmup} (or trainer=ddp)"
            )

    @torch.no_grad()
    def as_sampled(self, batch: Batch, completions: Completions) -> tuple[Tensor | None, Tensor | None]:
        """Return log-probabilities and values, `[N, T]` each, from one pass."""
        privileged = self.privileged(batch)
        group, size = self.loop.group_size, self.loop.micro_batch_size
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
        """Return the privileged input `[N, 5]`, box and area of the truth; None if the critic has none."""
        if self.critic.insight == 0:
            return None
        facts = [
            [*(tight_box(s.mask).tolist() if s.mask.any() else [0.0] * 4), s.mask.mean()]
            for s in batch.samples
        ]
        return torch.tensor(facts, device=self.device).repeat_interleave(self.loop.group_size, 0)

    def credit(self, experience: Experience, rollout: ScoredRollout) -> Experience:
        """Return the experience with GAE advantages, whitened over the update, and the critic's targets.

        The targets have a decay of their own (VC-PPO, arXiv 2503.01491).
        """
        batch, completions = rollout.batch, rollout.completions
        rewards, mask = self.rewards(experience, rollout), completions.mask
        closes = torch.zeros_like(mask)
        if self.shaping is not None:
            assert isinstance(self.grammar, Unfolding), "runs.checks requires a grammar that lists steps"
            with self.whole_weights(self.head):
                shaped, closes = self.shaping(
                    self.grammar, self.head, self.policy.encoder, batch, completions, rollout.answers
                )
            rewards = rewards + shaped.to(rewards)
            closes = closes.to(mask.device)
        values = experience.values
        assert values is not None
        advantages = gae(rewards, values, mask, self.decay(mask=mask, closes=closes), self.discount)
        ahead = gae(rewards, values, mask, torch.full_like(values, self.learning.critic_decay), self.discount)
        returns = ahead + values
        return replace(
            experience,
            advantages=self._whitened(advantages, mask).masked_fill(~mask, 0.0),
            returns=returns,
            privileged=self.privileged(batch),
        )

    def _whitened(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Return advantages whitened by mean and standard deviation over the tokens of all ranks."""
        known = advantages[mask]
        moments = torch.stack([torch.tensor(float(len(known))).to(known), known.sum(), known.square().sum()])
        count, total, squares = self.over_ranks(moments).unbind()
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        return whiten(advantages, float(mean), float(deviation))

    def loss(self, part: Experience, weights: Tensor) -> LossOutput:
        """Return the sum of the policy's loss and the critic's, from one pass."""
        assert part.values is not None and part.returns is not None
        hidden = self.policy.read(part.prefixes, part.completions, part.state)
        actor = self.policy_loss(self.policy.logprobs_of(hidden, part.completions), part, weights)
        values = self.critic(hidden, part.prefixes, part.completions, part.privileged)
        judged = clipped_value_loss(values, part.values, part.returns, weights, self.learning.value_clip)
        return LossOutput(
            loss=actor.loss + self.learning.value_weight * judged.loss,
            stats={**actor.stats, **{f"critic/{name}": value for name, value in judged.stats.items()}},
        )

    def tame_gradients(self) -> dict[str, Tensor]:
        """Clip the gradients of policy and critic apart, and return both norms.

        In the warm-up the policy's gradients are removed, so its optimizer has no state yet afterwards.
        """
        policy, critic = self._sides()
        norms = {
            "policy/grad_norm": self.clip(policy),
            "critic/grad_norm": self.clip(critic),
        }
        if self.global_step < self.learning.critic_warmup:
            for parameter in policy:
                parameter.grad = None
        return norms

    def credit_stats(self, experience: Experience) -> dict[str, Tensor | float]:
        """Return the critic's explained variance and mean value over all sampled tokens."""
        assert experience.values is not None and experience.returns is not None
        mask = experience.completions.mask
        known = explained_variance(experience.values, experience.returns, mask)
        return {"critic/explained_variance": known, "critic/value": experience.values[mask].mean()}
