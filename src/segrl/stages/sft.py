"""Supervised fine-tuning: imitate completions that are written from masks or come with the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from segrl.data.collate import Trace
from segrl.models.kernels.prefix_pass import pad_right
from segrl.objectives.masked import per_token
from segrl.objectives.sft import sft
from segrl.protocols import Grammar
from segrl.segmenter import Segmenter
from segrl.stages.base import Optimization, SegStage
from segrl.types import Batch, Completions, Prefix


class SFTStage(SegStage):
    """Cross-entropy on the completions that `trace` writes.

    Args:
        segmenter, optimization, seed, trace, also: see `SegStage`.
        micro_batch_size: samples in one forward and backward pass; changes memory, not the result.
    """

    def __init__(
        self,
        *,
        segmenter: Segmenter,
        optimization: Optimization,
        seed: int,
        trace: Trace,
        also: Sequence[Grammar],
        micro_batch_size: int,
    ) -> None:
        super().__init__(segmenter=segmenter, optimization=optimization, seed=seed, trace=trace, also=also)
        self.automatic_optimization = False
        self.micro_batch_size = micro_batch_size

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Make one update."""
        assert batch.answers is not None, "a stage with a trace has a collate that writes answers"
        tokens, mask = pad_right(batch.answers, self.policy.pad_id)
        weights = per_token(mask, 1, float(self.over_ranks(mask.sum())))
        optimizer, loss = cast("LightningOptimizer", self.optimizers()), torch.zeros((), device=self.device)
        optimizer.zero_grad()
        for start in range(0, len(batch), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            completions = Completions(
                tokens=tokens[rows], mask=mask[rows], texts=[], finished=mask[rows].any(1)
            )
            part = self(batch.prefixes[rows], completions, weights[rows])
            self.backward_part(part, last=start + self.micro_batch_size >= len(batch))
            loss = loss + part.detach()
        self.step(optimizer)
        self.remember({"sft/loss": loss})

    def forward(self, prefixes: Sequence[Prefix], completions: Completions, weights: Tensor) -> Tensor:
        """Return the loss.

        Gradients flow through a call of the module, because strategies hook into that call.
        """
        return sft(self.policy.logprobs(prefixes, completions), weights).loss
