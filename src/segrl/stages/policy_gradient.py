"""The reinforcement learning loop, once: sample, score, credit, update."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean
from typing import Any, Protocol, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from segrl.models.hf_vlm import HFPolicy
from segrl.models.policy_card import PRECISIONS
from segrl.models.reference import AdapterOff, Reference
from segrl.objectives.masked import weighted_sum
from segrl.objectives.mismatch import truncated_importance
from segrl.objectives.policy_gradient import Divergence, MakeSurrogate, policy_gradient
from segrl.protocols import Grammar, MaskHead, RolloutEngine
from segrl.rewards.mixture import RewardMixture
from segrl.stages.base import MakeOptimizer, MakeSchedule, SegStage
from segrl.stages.zero import ZeRO
from segrl.types import Answer, Batch, Completions, Experience, LossOutput, Prefix, PrefixState, Scores

_STUCK = re.compile(r"(.)\1{19}", re.DOTALL)  # one character twenty times
MakeReference = Callable[[HFPolicy], Reference]
Rollout = tuple[Batch, Completions, list[Answer], Scores]


class TokenWeights(Protocol):
    """See `objectives.masked`."""

    def __call__(self, mask: Tensor, group_size: int, tokens: float) -> Tensor:
        """Tokens that count `[N, T]` to the share of each."""
        ...


class PolicyGradientStage(SegStage):
    """Reinforcement learning with a mask head as the judge; algorithms override `credit`, and `objective` to add to it.

    Args:
        policy, grammar, head, engine, optimizer, schedule, max_grad_norm, seed: see `SegStage`.
        reward: values answers.
        reference: makes the reference from the policy; none where no term needs it.
        group_size: completions per sample.
        micro_batch_size: samples whose groups are in one forward and backward pass; gradients add up.
        completions_per_pass: completions of each of them in one pass, for less memory; none takes groups whole.
        updates_per_rollout: minibatches of whole groups that one rollout is cut into.
        epochs_per_rollout: times each minibatch is used.
        surrogate: what a token's step is worth; see `objectives.clipped`.
        token_weights: share of each token in an update; see `objectives.masked`.
        divergence: estimates the divergence from the reference, per token; see `objectives.kl`.
        kl_weight: of the divergence in the loss.
        kl_reward: of the divergence, taken from the reward of each token; one of the two is zero.
        mismatch_cap: where another engine sampled, see `objectives.mismatch`; none corrects nothing.

    Raises:
        ValueError: if a weight of the divergence has no reference to be measured against, or both are positive.
    """

    frozen: tuple[str, ...] = ("head.", "reference.")

    def __init__(
        self, policy: HFPolicy, grammar: Grammar, head: MaskHead, engine: RolloutEngine, reward: RewardMixture,
        reference: MakeReference | None,
        optimizer: MakeOptimizer, schedule: MakeSchedule | None, max_grad_norm: float, seed: int,
        group_size: int, micro_batch_size: int, completions_per_pass: int | None, updates_per_rollout: int, epochs_per_rollout: int,
        surrogate: MakeSurrogate, token_weights: TokenWeights, divergence: Divergence, kl_weight: float, kl_reward: float,
        mismatch_cap: float | None,
    ) -> None:  # fmt: skip
        if kl_weight > 0 and kl_reward > 0:
            raise ValueError(
                f"stage.kl_reward: the divergence stands in the loss or in the reward; got weights {kl_weight} and {kl_reward}"
            )
        if kl_weight + kl_reward > 0 and reference is None:
            raise ValueError(
                f"reference: a reference is needed to measure a KL of weight {kl_weight + kl_reward}; got none"
            )
        if policy.lora is not None and policy.lora["dropout"] > 0:
            raise ValueError(
                f"policy.lora.dropout: 0 is needed, so that what samples is what is updated; got {policy.lora['dropout']}"
            )
        super().__init__(policy, grammar, head, engine, optimizer, schedule, max_grad_norm, seed)
        self.automatic_optimization = False
        self.make_reference = reference if kl_weight + kl_reward > 0 else None
        self.reference = None if self.make_reference is None else self.make_reference(policy)
        self.reward = reward
        self.group_size, self.micro_batch_size = group_size, micro_batch_size
        self.completions_per_pass = completions_per_pass
        self.updates_per_rollout, self.epochs_per_rollout = updates_per_rollout, epochs_per_rollout
        self.surrogate, self.token_weights, self.divergence = surrogate, token_weights, divergence
        self.kl_weight, self.kl_reward, self.mismatch_cap = kl_weight, kl_reward, mismatch_cap
        self.last_rollout: Rollout | None = None

    def setup(self, stage: str) -> None:
        """The precision of the passes is known now, and no strategy has laid hands on the weights yet."""
        if self.reference is not None and (passes := PRECISIONS[str(self.trainer.precision)]) is not None:
            self.reference.made_for(passes)

    @property
    def updates_per_batch(self) -> int:
        """Minibatches times epochs."""
        return self.updates_per_rollout * self.epochs_per_rollout

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """The reference starts there, too."""
        if isinstance(self.reference, AdapterOff) and any(".lora_" in name for name in weights):
            raise ValueError(
                "reference=adapter_off would measure against the weights without any adapter, not against this start: export "
                "it and set policy.weights, or take reference=frozen_copy"
            )
        super().start_from(weights)
        if self.make_reference is not None:
            self.reference = self.make_reference(self.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With what the reward remembers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward"], checkpoint["sampled"] = self.reward.state(), self.sampled

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With what the reward remembered."""
        super().on_load_checkpoint(checkpoint)
        self.reward.restore(checkpoint.get("reward", {}))
        self.sampled = checkpoint.get("sampled", 0)

    @abstractmethod
    def credit(self, experience: Experience, rollout: Rollout) -> Experience:
        """The experience with advantages, and with what else the objective needs; starts from `rewards`."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One rollout and its updates."""
        self.last_rollout = None  # its pixels leave before others come
        with self.whole_weights(self.head, *self.checkpointed()):
            state = self.read_once(batch)
            batch, completions, answers, scores = rollout = self.rollout(batch, state=state)
            old_logprobs, values = self.as_sampled(batch, completions)
        experience = Experience(
            prefixes=batch.prefixes,
            completions=completions,
            loss_mask=self.loss_mask(completions, scores),
            advantages=torch.zeros_like(completions.mask, dtype=torch.float32),
            old_logprobs=old_logprobs,
            reference_logprobs=self.reference_logprobs(batch, completions),
            values=values,
            state=state,
        )
        experience = self.credit(experience, rollout)
        self.last_rollout = rollout
        stats = [self.update(minibatch) for minibatch in self.minibatches(experience)]
        self.remember(
            {**self.rollout_stats(answers, scores), **self.credit_stats(experience), **_means(stats)}
        )

    def on_fit_start(self) -> None:
        """Raises ValueError for groups in pieces under ZeRO-3: their prefix is read outside of the call that gathers weights."""
        strategy = self.trainer.strategy
        if self.completions_per_pass is not None and isinstance(strategy, ZeRO) and strategy.zero_stage == 3:
            raise ValueError(
                f"stage.completions_per_pass: null is needed under ZeRO-3; got {self.completions_per_pass} (or trainer=deepspeed_zero2, "
                "or policy.gradient_checkpointing=true)"
            )

    def read_once(self, batch: Batch) -> PrefixState | None:
        """Read the prefixes once for sampling and learning, graph included; return None where each reads them itself.

        One reading serves both where a batch is sampled as a whole and learned in one pass and one update: the graph
        would be there in that pass anyway.
        """
        at_once = min(self.micro_batch_size, self.engine.prefixes_at_once or len(batch))
        alone = self.updates_per_batch == 1 and at_once >= len(batch)
        if not alone or self.policy.gradient_checkpointing or isinstance(self.trainer.strategy, ZeRO):
            return None
        return self.policy.prefill(batch.prefixes)

    def rollout(self, batch: Batch, first: int = 0, state: PrefixState | None = None) -> Rollout:
        """Sample, parse, draw and score; `first` is the place of the batch in a larger one."""
        seeds = self.seeds(first, len(batch))
        self.head.prepare([sample.image for sample in batch.samples])
        completions = self.engine.sample(self.policy, batch.prefixes, self.group_size, seeds, state)
        self.sampled += len(completions.tokens) * self.trainer.world_size
        answers = self.segmenter.read(batch, completions, self.group_size)
        return batch, completions, answers, self.reward(answers, batch.samples)

    def loss_mask(self, completions: Completions, scores: Scores) -> Tensor:
        """Tokens that count in the loss, bool `[N, T]`: all that were sampled."""
        return completions.mask

    def rewards(self, experience: Experience, rollout: Rollout) -> Tensor:
        """Of the tokens, float32 `[N, T]`: the answer's at its last one, less the divergence where that is priced here."""
        _, completions, _, scores = rollout
        rewards = torch.zeros_like(experience.advantages)
        last = (completions.lengths - 1).clamp_min(0)
        rewards.scatter_(1, last[:, None], scores.total.to(rewards).flatten()[:, None])
        return self.less_divergence(rewards, experience)

    def less_divergence(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Rewards `[N, T]` less `kl_reward` times the divergence of each token."""
        if self.kl_reward == 0:
            return rewards
        assert experience.old_logprobs is not None and experience.reference_logprobs is not None
        price = self.kl_reward * self.divergence(experience.old_logprobs, experience.reference_logprobs)
        return rewards - price.masked_fill(~experience.completions.mask, 0.0)

    def credit_stats(self, experience: Experience) -> dict[str, Tensor | float]:
        """What is to be known about how credit was given."""
        return {}

    def minibatches(self, experience: Experience) -> Iterator[Experience]:
        """Whole groups, as many minibatches as there are updates, anew in each epoch over the rollout."""
        size = -(-len(experience.prefixes) // self.updates_per_rollout)
        for _ in range(self.epochs_per_rollout):
            yield from (minibatch for minibatch, _ in experience.split(size))

    def seeds(self, first: int, samples: int) -> list[int]:
        """One per completion, by the sample's place in the batch of all ranks: their number changes nothing."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        keys = [(b * ranks + rank, g) for b in range(first, first + samples) for g in range(self.group_size)]
        return [self.noise_seed(*key) for key in keys]

    @torch.no_grad()
    def as_sampled(self, batch: Batch, completions: Completions) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities and a critic's values before any update, `[N, T]`; none that nothing asks for.

        With one update per rollout old is new, detached, and costs no pass.
        """
        if self.updates_per_batch == 1 and self.kl_reward == 0:
            return None, None
        return self.in_parts(self.policy.logprobs, batch, completions), None

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, completions: Completions) -> Tensor | None:
        """Return the reference's log-probabilities `[N, T]`, or None without one.

        Its weights are gathered after the policy's are given back: two whole copies at once are memory for nothing.
        """
        if self.reference is None:
            return None
        with self.whole_weights(self.reference.weights):
            return self.in_parts(self.reference.logprobs, batch, completions)

    def in_parts(
        self, read: Callable[[list[Prefix], Completions], Tensor], batch: Batch, completions: Completions
    ) -> Tensor:
        """What `read` says of each micro-batch, in a row."""
        size, group = self.micro_batch_size, self.group_size
        return torch.cat([
            read(batch.prefixes[b : b + size], completions.rows(slice(b * group, (b + size) * group)))
            for b in range(0, len(batch), size)
        ])  # fmt: skip

    def forward(self, part: Experience, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of `objective`; what gradients flow through is a call of the module, where strategies hook in."""
        out = self.objective(part, weights)
        return out.loss, out.stats

    def objective(self, part: Experience, weights: Tensor) -> LossOutput:
        """The loss of a part of an update, given its tokens' shares `[N, T]`."""
        logprobs = self.policy.logprobs(part.prefixes, part.completions, part.state)
        return self.policy_objective(logprobs, part, weights)

    def policy_objective(self, logprobs: Tensor, part: Experience, weights: Tensor) -> LossOutput:
        """What the policy is to make small."""
        drawn, mismatch, correction = part.completions.sampled_logprobs, {}, None
        if drawn is not None:
            old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
            mismatch["mismatch"] = weighted_sum((old - drawn).abs(), weights)
            if self.mismatch_cap is not None:
                correction = truncated_importance(old, drawn, weights, self.mismatch_cap)
        out = policy_gradient(
            logprobs, part.old_logprobs, part.reference_logprobs, part.advantages, weights,
            self.surrogate, self.divergence, self.kl_weight, correction,
        )  # fmt: skip
        stats = {f"policy/{name}": value for name, value in {**out.stats, **mismatch}.items()}
        return LossOutput(loss=out.loss, stats=stats)

    def update(self, minibatch: Experience) -> dict[str, Tensor]:
        """One optimizer step on whole groups; the parts' losses add up to the minibatch's."""
        optimizer = cast("LightningOptimizer", self.optimizers())
        tokens = self.over_ranks(minibatch.loss_mask.sum())
        weights = self.token_weights(minibatch.loss_mask, self.group_size, float(tokens))
        stats: dict[str, Tensor] = {}
        parts = list(minibatch.split(self.micro_batch_size))
        for i, (part, rows) in enumerate(parts):
            for name, value in self.learn(part, weights[rows], last=i == len(parts) - 1).items():
                stats[name] = stats.get(name, 0.0) + value
        # What is logged is a mean, whatever normalises the loss.
        share = self.over_ranks(weights.sum()).clamp_min(1e-12)
        stats = {name: value if name == "policy/loss" else value / share for name, value in stats.items()}
        stats |= self.tame_gradients()
        self.refuse_nonfinite(stats)
        optimizer.step()
        optimizer.zero_grad()  # nothing of it is there while the next rollout is sampled
        self.after_step()
        return stats

    def learn(self, part: Experience, weights: Tensor, last: bool) -> dict[str, Tensor]:
        """Add a part's gradients; where its groups are cut in pieces they gather in the prefixes, read and left once."""
        pieces, stats = list(part.pieces(self.completions_per_pass)), dict[str, Tensor]()
        whole = part.state or (self.policy.prefill(part.prefixes) if len(pieces) > 1 else None)
        leaves = whole.detached() if whole is not None and len(pieces) > 1 else None
        for i, (piece, rows) in enumerate(pieces):
            final = i == len(pieces) - 1
            loss, seen = self(replace(piece, state=whole if final else leaves), weights[rows])
            for name, value in {"policy/loss": loss.detach(), **seen}.items():
                stats[name] = stats.get(name, 0.0) + value
            if final and whole is not None and leaves is not None:
                loss = loss + whole.chain_gradient(leaves)
            self.backward_part(loss, last=last and final)
        return stats

    def refuse_nonfinite(self, stats: dict[str, Tensor]) -> None:
        """Raises ValueError before a loss or a gradient that is no number reaches the weights."""
        for name in ("policy/loss", "policy/grad_norm"):
            if not torch.isfinite(stats[name]):
                raise ValueError(
                    f"{name}: a finite number is needed; got {float(stats[name])} at update {self.global_step}; the "
                    "checkpoint before it is intact (lower stage.optimizer.lr, or look at trainer.precision)"
                )

    def tame_gradients(self) -> dict[str, Tensor]:
        """Scale gradients down to `max_grad_norm`; the norm that they had."""
        return {"policy/grad_norm": self.clip(p for p in self.parameters() if p.requires_grad)}

    def rollout_stats(self, answers: list[Answer], scores: Scores) -> dict[str, Tensor | float]:
        """What the rollout earned, and how."""
        total = scores.total
        return {
            "reward/total": total.mean(),
            **{f"reward/{name}": value.mean() for name, value in scores.terms.items()},
            "reward/spread": total.std(1).nan_to_num().mean(),  # a group of one has none
            "rollout/length": mean(answer.length for answer in answers),
            "rollout/fault_rate": mean(answer.parsed.fault is not None for answer in answers),
            "rollout/cut_off": mean(not answer.finished for answer in answers),
            "rollout/repeated": mean(_STUCK.search(answer.text) is not None for answer in answers),
            "rollout/dead_groups": (total.amax(1) == total.amin(1)).float().mean(),
        }


def _means(stats: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over the updates of a rollout."""
    return {name: torch.stack([s[name] for s in stats]).mean() for name in stats[0]}
