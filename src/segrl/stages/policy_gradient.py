"""The reinforcement learning loop, once: sample, score, advantage, update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from statistics import mean
from typing import cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from segrl.models.hf_vlm import HFPolicy
from segrl.models.reference import FrozenCopy
from segrl.protocols import Grammar, MaskHead, RolloutEngine
from segrl.rewards.mixture import RewardMixture
from segrl.stages.base import MakeOptimizer, MakeSchedule, SegStage
from segrl.types import Answer, Batch, Completions, Experience, LossOutput, Scores


class PolicyGradientStage(SegStage):
    """Reinforcement learning with a mask head as the judge; algorithms override `advantages` and `objective`.

    Args:
        policy, grammar, head, engine, optimizer, schedule, max_grad_norm, seed: see `SegStage`.
        reward: values completions.
        reference: makes the reference from the policy; none where no term needs it.
        group_size: completions per sample.
        micro_batch_size: samples whose groups are in one forward and backward pass; gradients add up.
        updates_per_rollout: minibatches of whole groups that one rollout is cut into.
        epochs_per_rollout: times each minibatch is used.
        token_weights: bool mask `[N, T]` of an update to the share of each token; see `objectives.masked`.
    """

    frozen: tuple[str, ...] = ("head.", "reference.")

    def __init__(
        self, policy: HFPolicy, grammar: Grammar, head: MaskHead, engine: RolloutEngine, reward: RewardMixture,
        reference: Callable[[HFPolicy], FrozenCopy] | None,
        optimizer: MakeOptimizer, schedule: MakeSchedule | None, max_grad_norm: float, seed: int,
        group_size: int, micro_batch_size: int, updates_per_rollout: int, epochs_per_rollout: int,
        token_weights: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        super().__init__(policy, grammar, head, engine, optimizer, schedule, max_grad_norm, seed)
        self.automatic_optimization = False
        self.reference = None if reference is None else reference(policy)
        self.reward = reward
        self.group_size, self.micro_batch_size = group_size, micro_batch_size
        self.updates_per_rollout, self.epochs_per_rollout = updates_per_rollout, epochs_per_rollout
        self.token_weights = token_weights
        self.last_rollout: tuple[Batch, list[Answer], Scores] | None = None

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """The reference starts there, too."""
        super().start_from(weights)
        if self.reference is not None:
            self.reference.policy.load_state_dict(weights)

    @abstractmethod
    def advantages(self, scores: Scores) -> Tensor:
        """float32 `[B, G]`."""

    @abstractmethod
    def objective(self, logprobs: Tensor, experience: Experience, weights: Tensor) -> LossOutput:
        """The loss of a part of an update, given the policy's log-probabilities `[N, T]` with gradient."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One rollout and its updates."""
        completions = self.engine.sample(self.policy, batch.prefixes, self.group_size, self.seeds(len(batch)))
        answers = self.segmenter.read(batch, completions, self.group_size)
        scores = self.reward(answers, batch.samples)
        experience = Experience(
            prefixes=batch.prefixes,
            completions=completions,
            advantages=self.advantages(scores).flatten().to(self.device),
            old_logprobs=self.old_logprobs(batch, completions),
            reference_logprobs=self.reference_logprobs(batch, completions),
        )
        stats = [self.update(minibatch) for minibatch in self.minibatches(experience)]
        self.last_rollout = batch, answers, scores
        self.remember({**self.rollout_stats(answers, scores), **stats[-1]})

    def minibatches(self, experience: Experience) -> Iterator[Experience]:
        """Whole groups, as many minibatches as there are updates, anew in each epoch over the rollout."""
        size = -(-len(experience.prefixes) // self.updates_per_rollout)
        for _ in range(self.epochs_per_rollout):
            yield from (minibatch for minibatch, _ in experience.split(size))

    def seeds(self, samples: int) -> list[int]:
        """One per completion, by the sample's place in the batch of all ranks: their number changes nothing."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        keys = [(b * ranks + rank, g) for b in range(samples) for g in range(self.group_size)]
        return [self.noise_seed(*key) for key in keys]

    @torch.no_grad()
    def old_logprobs(self, batch: Batch, completions: Completions) -> Tensor | None:
        """Only with more than one update per rollout: otherwise old is new, detached, and costs no pass."""
        if self.updates_per_rollout * self.epochs_per_rollout == 1:
            return None
        return self._in_parts(self.policy, batch, completions)

    def reference_logprobs(self, batch: Batch, completions: Completions) -> Tensor | None:
        """Only where there is a reference."""
        return None if self.reference is None else self._in_parts(self.reference, batch, completions)

    def _in_parts(self, model: HFPolicy | FrozenCopy, batch: Batch, completions: Completions) -> Tensor:
        size, group = self.micro_batch_size, self.group_size
        return torch.cat([
            model.logprobs(batch.prefixes[b : b + size], completions.rows(slice(b * group, (b + size) * group)))
            for b in range(0, len(batch), size)
        ])  # fmt: skip

    def update(self, minibatch: Experience) -> dict[str, Tensor]:
        """One optimizer step on whole groups; the parts' losses add up to the minibatch's."""
        optimizer = cast("LightningOptimizer", self.optimizers())
        weights = self.token_weights(minibatch.completions.mask)
        stats: dict[str, Tensor] = {}
        optimizer.zero_grad()
        for part, rows in minibatch.split(self.micro_batch_size):
            out = self.objective(self.policy.logprobs(part.prefixes, part.completions), part, weights[rows])
            self.manual_backward(out.loss)
            stats = {
                name: stats.get(name, 0.0) + value
                for name, value in {"loss": out.loss.detach(), **out.stats}.items()
            }
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters() if p.requires_grad], self.max_grad_norm
        )
        optimizer.step()
        if (schedule := self.lr_schedulers()) is not None:
            cast("torch.optim.lr_scheduler.LRScheduler", schedule).step()
        return {**{f"policy/{name}": value for name, value in stats.items()}, "policy/grad_norm": norm}

    def rollout_stats(self, answers: list[Answer], scores: Scores) -> dict[str, Tensor | float]:
        """What the rollout earned, and how."""
        total = scores.total
        return {
            "reward/total": total.mean(),
            **{f"reward/{name}": value.mean() for name, value in scores.terms.items()},
            "reward/spread": total.std(1).mean(),
            "rollout/length": mean(answer.length for answer in answers),
            "rollout/fault_rate": mean(answer.parsed.fault is not None for answer in answers),
            "rollout/cut_off": mean(not answer.finished for answer in answers),
            "rollout/dead_groups": (total.amax(1) == total.amin(1)).float().mean(),
        }
