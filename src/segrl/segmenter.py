"""The one inference path: policy, grammar and mask head joined; image and query to mask."""

from __future__ import annotations

from segrl.protocols import Grammar, MaskHead, Policy, RolloutEngine
from segrl.types import Answer, Batch, Completions


class Segmenter:
    """Samples and their completions to answers, the same in training, evaluation and use.

    Args:
        policy, grammar, engine, head: the same objects that train.
    """

    def __init__(self, policy: Policy, grammar: Grammar, engine: RolloutEngine, head: MaskHead) -> None:
        self.policy, self.grammar, self.engine, self.head = policy, grammar, engine, head

    def __call__(self, batch: Batch) -> list[Answer]:
        """One greedy answer per sample."""
        return self.read(batch, self.engine.greedy(self.policy, batch.prefixes), 1)

    def read(self, batch: Batch, completions: Completions, group_size: int) -> list[Answer]:
        """Parse and draw N = B*G completions; each image is encoded once for its group."""
        frames = [prefix.frame for prefix in batch.prefixes for _ in range(group_size)]
        parsed = [self.grammar.parse(t, f) for t, f in zip(completions.texts, frames, strict=True)]
        prompts = [
            [p.prompt for p in parsed[b * group_size : (b + 1) * group_size]] for b in range(len(batch))
        ]
        masks = [m for group in self.head.segment([s.image for s in batch.samples], prompts) for m in group]
        rows = zip(
            completions.texts,
            parsed,
            masks,
            completions.lengths.tolist(),
            completions.finished.tolist(),
            strict=True,
        )
        return [Answer(text=t, parsed=p, mask=m, length=n, finished=f) for t, p, m, n, f in rows]
