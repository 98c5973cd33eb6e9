"""Without a critic: a completion's advantage is its reward relative to its group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from torch import Tensor

from segrl.models.hf_vlm import HFPolicy
from segrl.objectives.policy_gradient import Divergence, MakeSurrogate
from segrl.protocols import Grammar, MaskHead, RolloutEngine
from segrl.rewards.mixture import RewardMixture
from segrl.stages.base import MakeOptimizer, MakeSchedule
from segrl.stages.policy_gradient import MakeReference, PolicyGradientStage, Rollout, TokenWeights
from segrl.types import Batch, Completions, Experience, PrefixState, Scores


class GRPOStage(PolicyGradientStage):
    """Group Relative Policy Optimization (arXiv 2402.03300) and its kin: SAM-R1, Dr.GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++.

    Args:
        advantage: rewards of groups `[B, G]`, of all ranks, to advantages; see `objectives.advantages`.
        live_samples: dynamic sampling (DAPO, arXiv 2503.14476, 3.2): of a batch so many samples are taken, per rank, whose
            groups have spread; they are tried that many at a time until there are enough. Where they run out, groups
            without spread fill up and count nothing. None takes the batch as it is.
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
        advantage: Callable[[Tensor], Tensor], live_samples: int | None,
    ) -> None:  # fmt: skip
        super().__init__(
            policy, grammar, head, engine, reward, reference, optimizer, schedule, max_grad_norm, seed, group_size,
            micro_batch_size, completions_per_pass, updates_per_rollout, epochs_per_rollout, surrogate, token_weights, divergence,
            kl_weight, kl_reward, mismatch_cap,
        )  # fmt: skip
        self.advantage, self.live_samples = advantage, live_samples

    def credit(self, experience: Experience, rollout: Rollout) -> Experience:
        """Every token has its completion's advantage."""
        rewards = self.rewards(experience, rollout).sum(1).view(-1, self.group_size)
        everywhere = cast("Tensor", self.all_gather(rewards)).reshape(-1, self.group_size)
        first = self.global_rank * len(rewards)
        own = self.advantage(everywhere)[first : first + len(rewards)].reshape(-1, 1)
        return replace(experience, advantages=own.expand(experience.completions.mask.shape).contiguous())

    def read_once(self, batch: Batch) -> PrefixState | None:
        """Not under dynamic sampling, which does not know yet what it will learn from."""
        return super().read_once(batch) if self.live_samples is None else None

    def rollout(self, batch: Batch, first: int = 0, state: PrefixState | None = None) -> Rollout:
        """Of the batch, or of its first samples whose groups have spread."""
        if self.live_samples is None:
            return super().rollout(batch, first, state)
        tried: list[Rollout] = []
        live: list[int] = []
        for start in range(0, len(batch), self.live_samples):
            places = range(start, min(start + self.live_samples, len(batch)))
            tried.append(super().rollout(batch.take(places), start))
            live += [start + b for b in _with_spread(tried[-1][3]).nonzero()[:, 0].tolist()]
            if len(live) >= self.live_samples:
                break
        seen = sum(len(part[0]) for part in tried)
        chosen = (live + [b for b in range(seen) if b not in live])[: self.live_samples]
        rows = [b * self.group_size + g for b in chosen for g in range(self.group_size)]
        answers = [answer for part in tried for answer in part[2]]
        return (
            batch.take(chosen),
            Completions.joined([part[1] for part in tried]).take(rows),
            [answers[n] for n in rows],
            Scores.joined([part[3] for part in tried]).take(chosen),
        )

    def loss_mask(self, completions: Completions, scores: Scores) -> Tensor:
        """All, or under dynamic sampling those of groups that have spread."""
        if self.live_samples is None:
            return super().loss_mask(completions, scores)
        live = _with_spread(scores).to(completions.mask.device)
        return completions.mask & live.repeat_interleave(self.group_size)[:, None]


def _with_spread(scores: Scores) -> Tensor:
    """Bool `[B]`."""
    return scores.total.amax(1) > scores.total.amin(1)
