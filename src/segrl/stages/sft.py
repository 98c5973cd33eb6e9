"""Supervised fine-tuning on chat traces: the cold start."""

from __future__ import annotations

from torch import Tensor

from segrl.models.shared_prefix import pad_right
from segrl.objectives.masked import per_token
from segrl.objectives.sft import sft
from segrl.stages.base import SegStage
from segrl.types import Batch, Completions


class SFTStage(SegStage):
    """Imitates the answers that `trace` writes; see `SegStage` for the arguments."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update: cross-entropy on the answers' tokens."""
        if batch.answers is None:
            raise ValueError("stage.trace: a trace writer is needed to imitate; got none")
        tokens, mask = pad_right(batch.answers, self.policy.pad_id)
        finished = mask.any(1)
        answers = Completions(tokens=tokens, mask=mask, texts=[], finished=finished)
        logprobs = self.policy.logprobs(batch.prefixes, answers)
        out = sft(logprobs, per_token(mask, 1, float(self.over_ranks(mask.sum()))))
        self.remember({"sft/loss": out.stats["loss"]})
        return out.loss
