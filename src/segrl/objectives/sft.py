"""Compute the loss of supervised fine-tuning."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from segrl.objectives.masked import counted, weighted_sum
from segrl.types import LossOutput


def sft(logprobs: Float[Tensor, "N T"], weights: Float[Tensor, "N T"]) -> LossOutput:
    """Return the loss `L = -Σ_nt w[n,t] log π(y[n,t])`, the cross-entropy of the completion's tokens.

    Args:
        logprobs: log-probabilities of the completion's tokens, with gradient; the prompt's tokens are not
            among them.
        weights: w, weight of each token in the loss; see `objectives.masked`.
    """
    loss = weighted_sum(-counted(logprobs, weights), weights)
    return LossOutput(loss=loss, stats={"loss": loss.detach()})
