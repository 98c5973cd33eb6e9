"""Weighted sum of named reward terms, with its breakdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NotRequired, TypedDict

import torch

from segrl.protocols import RememberingTerm, RewardTerm
from segrl.types import Answer, Sample, Scores


class Term(TypedDict):
    """One entry of `terms` in `conf/reward`."""

    fn: RewardTerm
    weight: float
    needs: NotRequired[Sequence[str]]
    """Parts that the grammar must be able to express; see `protocols.Grammar.says`."""


class RewardMixture:
    """Weighted sum of terms, each keyed by its name in the config.

    Args:
        terms: function and weight by name.

    Raises:
        ValueError: if there is no term, or a weight is not positive.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        if not terms:
            raise ValueError("reward.terms: must hold at least one term; got none")
        for name, term in terms.items():
            if not term["weight"] > 0:
                raise ValueError(f"reward.terms.{name}.weight: must be positive; got {term['weight']}")
        self.terms = {name: (term["fn"], float(term["weight"])) for name, term in terms.items()}
        self.remembering = {n: fn for n, (fn, _) in self.terms.items() if isinstance(fn, RememberingTerm)}

    def state(self) -> dict[str, list[float]]:
        """Return the memory of the terms that have one, by name, for a checkpoint."""
        return {name: fn.remembered() for name, fn in self.remembering.items()}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Restore the memory of the terms that have one."""
        for name, fn in self.remembering.items():
            if name in state:
                fn.remember(state[name])

    def __call__(self, answers: Sequence[Answer], samples: Sequence[Sample]) -> Scores:
        """Score N = B*G answers to B samples, groups contiguous; ignored pixels are removed from each mask.

        Raises:
            ValueError: if a term pays a number that is not finite.
        """
        group = len(answers) // len(samples)
        assert group * len(samples) == len(answers), "each sample has a whole group"
        counted = [replace(a, mask=samples[n // group].counted(a.mask)) for n, a in enumerate(answers)]
        terms = {}
        for name, (fn, _) in self.terms.items():
            values = [fn(answer, samples[n // group]) for n, answer in enumerate(counted)]
            for n, value in enumerate(values):
                if not math.isfinite(value):
                    raise ValueError(
                        f"reward.terms.{name}: must return a finite number; "
                        f"got {value} for an answer to {samples[n // group].id}"
                    )
            terms[name] = torch.tensor(values, dtype=torch.float32).view(len(samples), group)
        for fn in self.remembering.values():
            fn.settle()
        total = torch.stack([weight * terms[name] for name, (_, weight) in self.terms.items()]).sum(0)
        return Scores(total=total, terms=terms)
