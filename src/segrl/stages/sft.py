"""Supervised fine-tuning on chat traces: the cold start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from segrl.data.collate import Trace
from segrl.models.hf_vlm import HFPolicy
from segrl.models.kernels.prefix_pass import pad_right
from segrl.objectives.masked import per_token
from segrl.objectives.sft import sft
from segrl.protocols import Grammar, MaskHead, RolloutEngine
from segrl.stages.base import MakeOptimizer, MakeSchedule, SegStage
from segrl.types import Batch, Completions, Prefix


class SFTStage(SegStage):
    """Imitates the answers that `trace` writes.

    Args:
        micro_batch_size: samples in one forward and backward pass; gradients add up.
        policy, grammar, head, engine, optimizer, schedule, max_grad_norm, seed, trace, also: see `SegStage`.
    """

    def __init__(
        self, policy: HFPolicy, grammar: Grammar, head: MaskHead, engine: RolloutEngine,
        optimizer: MakeOptimizer, schedule: MakeSchedule | None, max_grad_norm: float, seed: int,
        trace: Trace, also: Sequence[Grammar], micro_batch_size: int,
    ) -> None:  # fmt: skip
        super().__init__(policy, grammar, head, engine, optimizer, schedule, max_grad_norm, seed, trace, also)
        self.automatic_optimization = False
        self.micro_batch_size = micro_batch_size

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update: cross-entropy on the answers' tokens."""
        assert batch.answers is not None, "the collate of a stage with a trace writes answers"
        tokens, mask = pad_right(batch.answers, self.policy.pad_id)
        weights = per_token(mask, 1, float(self.over_ranks(mask.sum())))
        optimizer, loss = cast("LightningOptimizer", self.optimizers()), torch.zeros((), device=self.device)
        optimizer.zero_grad()
        for start in range(0, len(batch), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            said = Completions(tokens=tokens[rows], mask=mask[rows], texts=[], finished=mask[rows].any(1))
            part = self(batch.prefixes[rows], said, weights[rows])
            self.backward_part(part, last=start + self.micro_batch_size >= len(batch))
            loss = loss + part.detach()
        self.step(optimizer)
        self.remember({"sft/loss": loss})

    def forward(self, prefixes: Sequence[Prefix], said: Completions, weights: Tensor) -> Tensor:
        """The loss; what gradients flow through is a call of the module, where strategies hook in."""
        return sft(self.policy.logprobs(prefixes, said), weights).loss
