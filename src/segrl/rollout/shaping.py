"""Dense rewards: reward each box and point of a completion at the token that completes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from segrl.protocols import Encoder, MaskHead, Unfolding
from segrl.types import Answer, Batch, Completions


class PromptShaping:
    """Potential-based shaping (Ng et al. 1999).

    The reward is c (Φ_k - Φ_{k-1}) at the token that completes the k-th box or point, and -c Φ_K at the
    last token, where Φ_k = f(mask(p_1..p_k), truth) and Φ_0 = 0.

    The rewards of a completion add up to zero. So with a discount of 1, optimal policies stay optimal and the
    advantages of an exact critic do not change; only a critic with errors gains. Steps of completions that
    cannot be parsed are rewarded, too. Otherwise the policy would learn to write a fault after a good box, to
    avoid the last, negative reward.

    Args:
        potential: f, a function of a mask and the true mask.
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
        """Return rewards float32 `[N, T]`, and bool `[N, T]`, true on tokens that complete a step."""
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
