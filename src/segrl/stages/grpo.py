"""Reinforcement learning without a critic: an advantage is a reward relative to its group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from torch import Tensor

from segrl.objectives.policy_gradient import PolicyGradient
from segrl.rewards.mixture import RewardMixture
from segrl.segmenter import Segmenter
from segrl.stages.base import Optimization
from segrl.stages.policy_gradient import Loop, MakeReference, PolicyGradientStage
from segrl.stages.scored_rollout import ScoredRollout
from segrl.types import Batch, Experience, PrefixState, Scores


class GRPOStage(PolicyGradientStage):
    """Group Relative Policy Optimization (arXiv 2402.03300) and its variants.

    SAM-R1, Dr.GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE++ differ in the objective and the advantage.

    Args:
        segmenter, reward, reference, objective, loop, optimization, seed: see `PolicyGradientStage`.
        advantage: turns the rewards of all ranks' groups, `[B, G]`, into advantages; see
            `objectives.advantages`.
        live_samples: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): number of samples of a batch,
            per rank, to learn from. The first ones whose rewards differ within the group are taken; if there
            are too few, other samples fill up and their tokens are left out of the loss mask. If None,
            the whole batch is used.
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
        advantage: Callable[[Tensor], Tensor],
        live_samples: int | None,
    ) -> None:
        super().__init__(
            segmenter=segmenter, reward=reward, reference=reference, objective=objective, loop=loop,
            optimization=optimization, seed=seed,
        )  # fmt: skip
        self.advantage, self.live_samples = advantage, live_samples

    def credit(self, experience: Experience, rollout: ScoredRollout) -> Experience:
        """Return the experience in which every token has the advantage of its completion."""
        group = self.loop.group_size
        rewards = self.rewards(experience, rollout).sum(1).view(-1, group)
        everywhere = cast("Tensor", self.all_gather(rewards)).reshape(-1, group)
        first = self.global_rank * len(rewards)
        own = self.advantage(everywhere)[first : first + len(rewards)].reshape(-1, 1)
        return replace(experience, advantages=own.expand(experience.completions.mask.shape).contiguous())

    def read_once(self, batch: Batch) -> PrefixState | None:
        """Read the prefixes once; return None under dynamic sampling, which samples before it chooses."""
        return super().read_once(batch) if self.live_samples is None else None

    def rollout(self, batch: Batch, first: int = 0, state: PrefixState | None = None) -> ScoredRollout:
        """Sample and score the batch or, under dynamic sampling, parts of it until there are enough samples.

        Then return `live_samples` of them, first those whose rewards differ within the group.
        """
        if self.live_samples is None:
            return super().rollout(batch, first, state)
        tried: list[ScoredRollout] = []
        live: list[int] = []
        for start in range(0, len(batch), self.live_samples):
            places = range(start, min(start + self.live_samples, len(batch)))
            tried.append(super().rollout(batch.take(places), start))
            live += [start + b for b in _with_spread(tried[-1].scores).nonzero()[:, 0].tolist()]
            if len(live) >= self.live_samples:
                break
        whole = ScoredRollout.joined(batch, tried)
        chosen = (live + [b for b in range(len(whole.batch)) if b not in live])[: self.live_samples]
        return whole.take(chosen)

    def loss_mask(self, rollout: ScoredRollout) -> Tensor:
        """Return the loss mask, bool `[N, T]`: all sampled tokens.

        Under dynamic sampling it is False for groups in which all rewards are equal.
        """
        mask = super().loss_mask(rollout)
        if self.live_samples is None:
            return mask
        live = _with_spread(rollout.scores).to(mask.device)
        return mask & live.repeat_interleave(self.loop.group_size)[:, None]


def _with_spread(scores: Scores) -> Tensor:
    """Return a bool per group, `[B]`: True if its rewards are not all equal."""
    return scores.total.amax(1) > scores.total.amin(1)
