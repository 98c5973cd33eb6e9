"""One rollout with its scores, as it goes from sampling to credit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segrl.types import Answer, Batch, Completions, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """B samples, their N = B*G completions and answers, and the rewards of these."""

    batch: Batch
    completions: Completions
    answers: list[Answer]
    """N answers, groups contiguous."""
    scores: Scores

    @property
    def group_size(self) -> int:
        """The number of completions per sample."""
        return len(self.answers) // len(self.batch)

    def take(self, places: Sequence[int]) -> ScoredRollout:
        """Return the samples at `places`, in that order, with their whole groups."""
        rows = [b * self.group_size + g for b in places for g in range(self.group_size)]
        return ScoredRollout(
            batch=self.batch.take(places),
            completions=self.completions.take(rows),
            answers=[self.answers[n] for n in rows],
            scores=self.scores.take(places),
        )

    @classmethod
    def joined(cls, batch: Batch, parts: Sequence[ScoredRollout]) -> ScoredRollout:
        """Return rollouts of consecutive parts of `batch` as one rollout of its first samples."""
        count = sum(len(part.batch) for part in parts)
        return cls(
            batch=batch.take(range(count)),
            completions=Completions.joined([part.completions for part in parts]),
            answers=[answer for part in parts for answer in part.answers],
            scores=Scores.joined([part.scores for part in parts]),
        )
