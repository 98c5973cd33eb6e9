"""The loop of reinforcement learning: sample, score, give credit, update."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from segrl.models.policy_card import PRECISIONS
from segrl.models.reference import AdapterOff, Reference
from segrl.objectives.masked import weighted_sum
from segrl.objectives.mismatch import truncated_importance
from segrl.objectives.policy_gradient import PolicyGradient, policy_gradient
from segrl.rewards.mixture import RewardMixture
from segrl.segmenter import Segmenter
from segrl.stages.base import Optimization, SegStage
from segrl.stages.scored_rollout import ScoredRollout
from segrl.types import Batch, Completions, Experience, LossOutput, Prefix, PrefixState

_STUCK = re.compile(r"(.)\1{19}", re.DOTALL)  # one character twenty times in a row
MakeReference = Callable[[Any], Reference]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """How a rollout is cut into updates and passes.

    Attributes:
        group_size: completions per sample.
        micro_batch_size: samples, with their whole groups, in one forward and backward pass.
        completions_per_pass: completions of each of these samples in one pass, for less memory. If None, the
            whole group.
        updates_per_rollout: minibatches of whole groups that a rollout is divided into.
        epochs_per_rollout: passes over each rollout.
    """

    group_size: int
    micro_batch_size: int
    completions_per_pass: int | None
    updates_per_rollout: int
    epochs_per_rollout: int

    @property
    def updates(self) -> int:
        """Updates per rollout, all epochs together."""
        return self.updates_per_rollout * self.epochs_per_rollout


class PolicyGradientStage(SegStage):
    """Reinforcement learning with a mask head as the judge.

    An algorithm overrides `credit`, and `loss` if it adds a term.

    Args:
        segmenter, optimization, seed: see `SegStage`.
        reward: scores answers.
        reference: makes the frozen reference from the policy; None if no term needs it.
        objective: surrogate, token weights and divergence.
        loop: sizes of groups, passes and updates.

    Raises:
        ValueError: if the divergence has a weight but there is no reference, or an adapter has dropout.
    """

    frozen: tuple[str, ...] = ("head.", "reference.")

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
    ) -> None:
        super().__init__(segmenter=segmenter, optimization=optimization, seed=seed)
        if objective.needs_reference and reference is None:
            raise ValueError(
                f"reference: must be given, to measure a KL of weight "
                f"{objective.kl_weight + objective.kl_reward}; got None"
            )
        if self.policy.lora is not None and self.policy.lora["dropout"] > 0:
            raise ValueError(
                f"policy.lora.dropout: must be 0, so that the policy that samples is the one that is "
                f"updated; got {self.policy.lora['dropout']}"
            )
        self.automatic_optimization = False
        self.make_reference = reference if objective.needs_reference else None
        self.reference = None if self.make_reference is None else self.make_reference(self.policy)
        self.reward, self.objective, self.loop = reward, objective, loop
        self.last_rollout: ScoredRollout | None = None

    def setup(self, stage: str) -> None:
        """Cast the reference: the precision is known, and no strategy has wrapped the module yet."""
        if self.reference is not None and (passes := PRECISIONS[str(self.trainer.precision)]) is not None:
            self.reference.made_for(passes)

    @property
    def updates_per_batch(self) -> int:
        """Number of updates of one rollout, all epochs together."""
        return self.loop.updates

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Load the policy of an earlier stage, also into the reference."""
        if isinstance(self.reference, AdapterOff) and any(".lora_" in name for name in weights):
            raise ValueError(
                "reference: adapter_off must not be used with an adapter that is already trained: it "
                "measures against the weights without any adapter (export the policy and set "
                "policy.weights, or set reference=frozen_copy)"
            )
        super().start_from(weights)
        if self.make_reference is not None:
            self.reference = self.make_reference(self.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the reward's state and the number of sampled completions."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward"], checkpoint["sampled"] = self.reward.state(), self.sampled

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the reward's state and the number of sampled completions."""
        super().on_load_checkpoint(checkpoint)
        self.reward.restore(checkpoint.get("reward", {}))
        self.sampled = checkpoint.get("sampled", 0)

    @abstractmethod
    def credit(self, experience: Experience, rollout: ScoredRollout) -> Experience:
        """Return the experience with advantages and the other tensors that the loss needs."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Make one rollout and its updates."""
        self.last_rollout = None  # free the previous rollout's images before sampling
        with self.whole_weights(self.head, *self.checkpointed()):
            state = self.read_once(batch)
            rollout = self.rollout(batch, state=state)
            batch, completions = rollout.batch, rollout.completions
            old_logprobs, values = self.as_sampled(batch, completions)
        experience = Experience(
            prefixes=batch.prefixes,
            completions=completions,
            loss_mask=self.loss_mask(rollout),
            advantages=torch.zeros_like(completions.mask, dtype=torch.float32),
            old_logprobs=old_logprobs,
            reference_logprobs=self.reference_logprobs(batch, completions),
            values=values,
            state=state,
        )
        experience = self.credit(experience, rollout)
        self.last_rollout = rollout
        stats = [self.update(minibatch) for minibatch in self.minibatches(experience)]
        self.remember({**self.rollout_stats(rollout), **self.credit_stats(experience), **_means(stats)})

    def on_fit_start(self) -> None:
        """Raise ValueError for split groups under a strategy that shards weights.

        Their prefix is read outside the module's call, in which such a strategy gathers the weights.
        """
        if self.loop.completions_per_pass is not None and not self.sharding.split_groups:
            raise ValueError(
                f"stage.completions_per_pass: must be null where the strategy shards weights (ZeRO-3); "
                f"got {self.loop.completions_per_pass} (or trainer=deepspeed_zero2, or "
                "policy.gradient_checkpointing=true)"
            )

    def read_once(self, batch: Batch) -> PrefixState | None:
        """Read the prefixes, with their graph, once for sampling and learning.

        That needs a batch that is sampled as a whole and learned in one pass and one update; it costs no
        memory, because that pass would keep the same graph. Otherwise return None: sampling and learning
        read the prefixes themselves.
        """
        at_once = min(self.loop.micro_batch_size, self.engine.prefixes_at_once or len(batch))
        alone = self.updates_per_batch == 1 and at_once >= len(batch)
        if not alone or self.policy.gradient_checkpointing or not self.sharding.early_graphs:
            return None
        return self.policy.prefill(batch.prefixes)

    def rollout(self, batch: Batch, first: int = 0, state: PrefixState | None = None) -> ScoredRollout:
        """Sample, parse, decode masks and score.

        Args:
            batch: B samples.
            first: place of the first sample in the training batch, for the seeds.
            state: the prefixes as `read_once` has read them.
        """
        seeds = self.seeds(first, len(batch))
        self.head.prepare([sample.image for sample in batch.samples])
        completions = self.engine.sample(self.policy, batch.prefixes, self.loop.group_size, seeds, state)
        self.sampled += len(completions.tokens) * self.trainer.world_size
        answers = self.segmenter.read(batch, completions, self.loop.group_size)
        scores = self.reward(answers, batch.samples)
        return ScoredRollout(batch=batch, completions=completions, answers=answers, scores=scores)

    def loss_mask(self, rollout: ScoredRollout) -> Tensor:
        """Return the loss mask, bool `[N, T]`: by default all sampled tokens."""
        return rollout.completions.mask

    def rewards(self, experience: Experience, rollout: ScoredRollout) -> Tensor:
        """Return the reward of each token, float32 `[N, T]`.

        The answer's reward stands at the last token; `kl_reward` times the divergence is subtracted from
        every token.
        """
        rewards = torch.zeros_like(experience.advantages)
        last = (rollout.completions.lengths - 1).clamp_min(0)
        rewards.scatter_(1, last[:, None], rollout.scores.total.to(rewards).flatten()[:, None])
        return self.less_divergence(rewards, experience)

    def less_divergence(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Return rewards `[N, T]` minus `kl_reward` times the divergence of each token."""
        if self.objective.kl_reward == 0:
            return rewards
        assert experience.old_logprobs is not None and experience.reference_logprobs is not None
        divergence = self.objective.divergence(experience.old_logprobs, experience.reference_logprobs)
        price = self.objective.kl_reward * divergence
        return rewards - price.masked_fill(~experience.completions.mask, 0.0)

    def credit_stats(self, experience: Experience) -> dict[str, Tensor | float]:
        """Return scalars to log about `credit`; by default none."""
        return {}

    def minibatches(self, experience: Experience) -> Iterator[Experience]:
        """Yield minibatches of whole groups, `updates_per_rollout` in each epoch."""
        size = -(-len(experience.prefixes) // self.loop.updates_per_rollout)
        for _ in range(self.loop.epochs_per_rollout):
            yield from (minibatch for minibatch, _ in experience.split(size))

    def seeds(self, first: int, samples: int) -> list[int]:
        """Return one seed per completion.

        It depends on the sample's place in the batch of all ranks, so the number of ranks changes nothing.
        """
        rank, ranks, group = self.trainer.global_rank, self.trainer.world_size, self.loop.group_size
        keys = [(b * ranks + rank, g) for b in range(first, first + samples) for g in range(group)]
        return [self.noise_seed(*key) for key in keys]

    @torch.no_grad()
    def as_sampled(self, batch: Batch, completions: Completions) -> tuple[Tensor | None, Tensor | None]:
        """Return log-probabilities and critic's values before any update, `[N, T]` each.

        Both are None where nothing needs them: with one update per rollout the loss detaches its own
        log-probabilities, which saves a pass.
        """
        if self.updates_per_batch == 1 and self.objective.kl_reward == 0:
            return None, None
        return self.in_parts(self.policy.logprobs, batch, completions), None

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, completions: Completions) -> Tensor | None:
        """Return the reference's log-probabilities `[N, T]`, or None without a reference.

        The caller has released the policy's gathered weights, so a rank never holds two whole models.
        """
        if self.reference is None:
            return None
        with self.whole_weights(self.reference.weights):
            return self.in_parts(self.reference.logprobs, batch, completions)

    def in_parts(
        self, read: Callable[[list[Prefix], Completions], Tensor], batch: Batch, completions: Completions
    ) -> Tensor:
        """Return the rows that `read` gives for each micro-batch, concatenated."""
        size, group = self.loop.micro_batch_size, self.loop.group_size
        return torch.cat([
            read(batch.prefixes[b : b + size], completions.rows(slice(b * group, (b + size) * group)))
            for b in range(0, len(batch), size)
        ])  # fmt: skip

    def forward(self, part: Experience, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its statistics.

        Gradients flow through a call of the module, because strategies hook into that call.
        """
        out = self.loss(part, weights)
        return out.loss, out.stats

    def loss(self, part: Experience, weights: Tensor) -> LossOutput:
        """Return the loss of a part of an update, given the weight of each token `[N, T]`."""
        logprobs = self.policy.logprobs(part.prefixes, part.completions, part.state)
        return self.policy_loss(logprobs, part, weights)

    def policy_loss(self, logprobs: Tensor, part: Experience, weights: Tensor) -> LossOutput:
        """Return the policy's loss, corrected for the rounding of another engine that sampled."""
        sampled, mismatch, correction = part.completions.sampled_logprobs, {}, None
        objective = self.objective
        if sampled is not None:
            old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
            mismatch["mismatch"] = weighted_sum((old - sampled).abs(), weights)
            if objective.mismatch_cap is not None:
                correction = truncated_importance(old, sampled, weights, objective.mismatch_cap)
        out = policy_gradient(
            logprobs, part.old_logprobs, part.reference_logprobs, part.advantages, weights,
            objective.surrogate, objective.divergence, objective.kl_weight, correction,
        )  # fmt: skip
        stats = {f"policy/{name}": value for name, value in {**out.stats, **mismatch}.items()}
        return LossOutput(loss=out.loss, stats=stats)

    def update(self, minibatch: Experience) -> dict[str, Tensor]:
        """Make one optimizer step on whole groups; the losses of the parts add up to the minibatch's."""
        optimizer = cast("LightningOptimizer", self.optimizers())
        tokens = self.over_ranks(minibatch.loss_mask.sum())
        weights = self.objective.token_weights(minibatch.loss_mask, self.loop.group_size, float(tokens))
        stats: dict[str, Tensor] = {}
        parts = list(minibatch.split(self.loop.micro_batch_size))
        for i, (part, rows) in enumerate(parts):
            for name, value in self.learn(part, weights[rows], last=i == len(parts) - 1).items():
                stats[name] = stats.get(name, 0.0) + value
        # Logged values are means over tokens, however the loss is normalised.
        share = self.over_ranks(weights.sum()).clamp_min(1e-12)
        stats = {name: value if name == "policy/loss" else value / share for name, value in stats.items()}
        stats |= self.tame_gradients()
        self.refuse_nonfinite(stats)
        optimizer.step()
        optimizer.zero_grad()  # free the gradients before the next rollout is sampled
        self.after_step()
        return stats

    def learn(self, part: Experience, weights: Tensor, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a part of an update and return its statistics.

        Groups may be learned in chunks (`completions_per_pass`). The prefixes are then read once; each chunk
        accumulates gradients in detached copies, and the last one sends them on into the prefixes' graph.
        """
        chunks, stats = list(part.chunks(self.loop.completions_per_pass)), dict[str, Tensor]()
        whole = part.state or (self.policy.prefill(part.prefixes) if len(chunks) > 1 else None)
        leaves = whole.detached() if whole is not None and len(chunks) > 1 else None
        for i, (chunk, rows) in enumerate(chunks):
            final = i == len(chunks) - 1
            loss, figures = self(replace(chunk, state=whole if final else leaves), weights[rows])
            for name, value in {"policy/loss": loss.detach(), **figures}.items():
                stats[name] = stats.get(name, 0.0) + value
            if final and whole is not None and leaves is not None:
                loss = loss + whole.chain_gradient(leaves)
            self.backward_part(loss, last=last and final)
        return stats

    def refuse_nonfinite(self, stats: dict[str, Tensor]) -> None:
        """Raise ValueError before a loss or gradient that is NaN or infinite changes the weights."""
        for name in ("policy/loss", "policy/grad_norm"):
            if not torch.isfinite(stats[name]):
                raise ValueError(
                    f"{name}: must be finite; got {float(stats[name])} at update {self.global_step}; the "
                    "checkpoint before it is intact (lower stage.optimizer.lr, or look at trainer.precision)"
                )

    def tame_gradients(self) -> dict[str, Tensor]:
        """Clip the gradients and return their norm before clipping, to be logged."""
        return {"policy/grad_norm": self.clip(p for p in self.parameters() if p.requires_grad)}

    def rollout_stats(self, rollout: ScoredRollout) -> dict[str, Tensor | float]:
        """Return scalars to log: mean rewards, their spread within groups, mean length, and four shares.

        The shares are of faults, of answers that were cut off or repeat one character, and of groups whose
        rewards are equal.
        """
        answers, scores, total = rollout.answers, rollout.scores, rollout.scores.total
        return {
            "reward/total": total.mean(),
            **{f"reward/{name}": value.mean() for name, value in scores.terms.items()},
            "reward/spread": total.std(1).nan_to_num().mean(),  # the deviation of one completion is NaN
            "rollout/length": mean(answer.length for answer in answers),
            "rollout/fault_rate": mean(answer.parsed.fault is not None for answer in answers),
            "rollout/cut_off": mean(not answer.finished for answer in answers),
            "rollout/repeated": mean(_STUCK.search(answer.text) is not None for answer in answers),
            "rollout/dead_groups": (total.amax(1) == total.amin(1)).float().mean(),
        }


def _means(stats: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each statistic over the updates of a rollout."""
    return {name: torch.stack([s[name] for s in stats]).mean() for name in stats[0]}
