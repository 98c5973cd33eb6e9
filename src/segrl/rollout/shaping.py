"""A reward for every box and point as it closes, that adds up to the reward of the whole answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from segrl.protocols import Encoder, MaskHead
from segrl.types import Answer, Batch, Completions, MaskPrompt


def unfolded(answer: Answer) -> list[tuple[int, MaskPrompt]]:
    """The mask prompt as it grew: for each box and point, in the order written, where its text ends and all up to it."""
    prompt, ends = answer.parsed.prompt, answer.parsed.ends
    if prompt is None:
        return []
    boxes = len(prompt.boxes)
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    steps = []
    for k in range(1, len(order) + 1):
        said = sorted(order[:k])
        points = [i - boxes for i in said if i >= boxes]
        part = MaskPrompt(
            boxes=prompt.boxes[[i for i in said if i < boxes]],
            points=prompt.points[points],
            labels=prompt.labels[points],
        )
        steps.append((ends[order[k - 1]], part))
    return steps


class PromptShaping:
    r"""Potential-based shaping: \( c(\Phi_k - \Phi_{k-1}) \) where the k-th box or point closes, \( -c\Phi_K \) at the end.

    \( \Phi_k = f(\mathrm{mask}(p_1..p_k), truth) \), \( \Phi_0 = 0 \). It adds up to zero over every completion, so with a discount
    of 1 the best policies stay the best (Ng et al. 1999), and an exact critic's advantages what they were: it helps a critic that errs.

    Args:
        potential: f, of a mask and the truth.
        weight: c.
    """

    def __init__(self, potential: Callable[[np.ndarray, np.ndarray], float], weight: float) -> None:
        self.potential, self.weight = potential, weight

    def __call__(
        self,
        head: MaskHead,
        encoder: Encoder,
        batch: Batch,
        completions: Completions,
        answers: Sequence[Answer],
    ) -> tuple[Tensor, Tensor]:
        """Rewards float32 `[N, T]` and the tokens that close something, bool `[N, T]`."""
        group = len(answers) // len(batch)
        steps = [unfolded(answer) for answer in answers]
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
