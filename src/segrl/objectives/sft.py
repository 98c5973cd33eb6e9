"""Supervised fine-tuning."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from segrl.objectives.masked import counted, weighted_sum
from segrl.types import LossOutput


def sft(logprobs: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> LossOutput:
    r"""\( L = -\sum_{nt} w_{nt} \log\pi(y_{nt}) \): cross-entropy on the answer's tokens only, never on the prompt's."""
    loss = weighted_sum(-counted(logprobs, weights), weights)
    return LossOutput(loss=loss, stats={"loss": loss.detach()})
