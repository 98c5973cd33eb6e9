"""Completions to scores: joins grammar, mask head and reward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segrl.protocols import Grammar, MaskHead
from segrl.rewards.mixture import RewardMixture
from segrl.types import Batch, Completions, Parsed, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """N completions, understood, drawn and valued; groups contiguous."""

    parsed: list[Parsed]
    masks: list[np.ndarray]
    scores: Scores

    @property
    def fault_rate(self) -> float:
        """Share of completions that are no sentence of the grammar."""
        return sum(p.fault is not None for p in self.parsed) / len(self.parsed)


class Scorer:
    """Parses, segments and rewards.

    Args:
        grammar, head, reward: see `protocols` and `RewardMixture`.
    """

    def __init__(self, grammar: Grammar, head: MaskHead, reward: RewardMixture) -> None:
        self.grammar, self.head, self.reward = grammar, head, reward

    def __call__(self, batch: Batch, completions: Completions, group_size: int) -> Scored:
        """Each image is encoded once for the `group_size` prompts of its group."""
        frames = [prefix.frame for prefix in batch.prefixes for _ in range(group_size)]
        parsed = [self.grammar.parse(t, f) for t, f in zip(completions.texts, frames, strict=True)]
        prompts = [
            [p.prompt for p in parsed[b * group_size : (b + 1) * group_size]] for b in range(len(batch))
        ]
        masks = [m for group in self.head.segment([s.image for s in batch.samples], prompts) for m in group]
        scores = self.reward(parsed, completions.texts, masks, batch.samples)
        return Scored(parsed=parsed, masks=masks, scores=scores)
