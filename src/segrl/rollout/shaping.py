"""A reward for every box and point as it closes, that adds up to the reward of the whole answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from segrl.protocols import Encoder, MaskHead, Unfolding
from segrl.types import Answer, Batch, Completions


class PromptShaping:
    r"""Potential-based shaping: \( c(\Phi_k - \Phi_{k-1}) \) where the k-th box or point closes, \( -c\Phi_K \) at the end.

    \( \Phi_k = f(\mathrm{mask}(p_1..p_k), truth) \), \( \Phi_0 = 0 \). It adds up to zero over every completion, so with a discount
    of 1 the best policies stay the best (Ng et al. 1999), and an exact critic's advantages what they were: it helps a critic that errs.
    A step is paid whether or not the completion can be parsed in the end: paid only where it can, a fault behind a good box would
    save the policy the last, negative payment, and be learned.

    Args:
        potential: f, of a mask and the truth.
        weight: c.
    """

    def __init__(self, potential: Callable[[np.ndarray, np.ndarray], float], weight: float) -> None:
        self.potential, self.weight = potential, weight

    def __call__(
        self,
        grammar: Unfolding,
        head: MaskHead,
        encoder: Encoder,
        batch: Batch,
        completions: Completions,
        answers: Sequence[Answer],
    ) -> tuple[Tensor, Tensor]:
        """Rewards float32 `[N, T]` and the tokens that close something, bool `[N, T]`."""
        group = len(answers) // len(batch)
        steps = [
            grammar.unfold(answer.text, batch.prefixes[n // group].frame) for n, answer in enumerate(answers)
        ]
        prompts = [
            [part for row in steps[b * group : (b + 1) * group] for _, part in row] for b in range(len(batch))
        ]
        masks = [iter(drawn) for drawn in head.segment([s.image for s in batch.samples], prompts)]
        rewards = torch.zeros(completions.tokens.shape)
        closes = torch.zeros(completions.tokens.shape, dtype=torch.bool)
        lengths = completions.lengths.tolist()
        for n, row in enumerate(steps):
            truth, before = batch.samples[n // group].mask, 0.0
            tokens = completions.tokens[n, : lengths[n]]
            for end, _ in row:
                now = self.potential(next(masks[n // group]), truth)
                at = encoder.token_at(tokens, end)
                rewards[n, at] += self.weight * (now - before)
                closes[n, at] = True
                before = now
            if row:
                rewards[n, lengths[n] - 1] -= self.weight * before
        return rewards, closes
