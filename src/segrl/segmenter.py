"""The one inference path: policy, grammar and mask head joined; image and query to mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segrl.protocols import Grammar, MaskHead, Policy, RolloutEngine
from segrl.types import Batch, Parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """One answer and what it led to."""

    text: str
    parsed: Parsed
    mask: np.ndarray
    """bool `[H, W]` of the image's own size; empty where the answer could not be parsed."""


class Segmenter:
    """Answers a batch greedily.

    Args:
        policy, grammar, engine, head: the same objects that train.
    """

    def __init__(self, policy: Policy, grammar: Grammar, engine: RolloutEngine, head: MaskHead) -> None:
        self.policy, self.grammar, self.engine, self.head = policy, grammar, engine, head

    def __call__(self, batch: Batch) -> list[Segmentation]:
        """One segmentation per sample."""
        texts = self.engine.greedy(self.policy, batch.prefixes).texts
        parsed = [self.grammar.parse(t, p.frame) for t, p in zip(texts, batch.prefixes, strict=True)]
        masks = self.head.segment([s.image for s in batch.samples], [[p.prompt] for p in parsed])
        return [
            Segmentation(text=text, parsed=answer, mask=mask)
            for text, answer, (mask,) in zip(texts, parsed, masks, strict=True)
        ]
