"""Samples to batches, in the loader's workers: pixels and tokens are made here, once per sample."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from segrl.protocols import Encoder, Grammar
from segrl.types import Batch, Parsed, Sample


class Trace(Protocol):
    """Writes the answer to imitate; see `data.traces.Annotator`."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Parsed:
        """What an annotator answers to a sample."""
        ...


class Collate:
    """Samples to a batch.

    Args:
        encoder, grammar: of the policy; none leaves the prefixes out, for a stage that has no policy.
        trace: writes the answers to imitate; none where completions are sampled.
        also: grammars that are imitated beside `grammar`; samples take turns.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        grammar: Grammar | None,
        trace: Trace | None = None,
        also: Sequence[Grammar] = (),
    ) -> None:
        self.encoder, self.grammar, self.trace = encoder, grammar, trace
        self.also = tuple(also)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """B samples to one batch."""
        if self.encoder is None or self.grammar is None:
            return Batch(samples=list(samples), prefixes=[])
        choice = (self.grammar, *self.also)
        keys = [zlib.crc32(sample.id.encode()) for sample in samples]
        grammars = [choice[key % len(choice)] for key in keys]
        prefixes = [
            self.encoder.encode(g.messages(s.query), s.image) for g, s in zip(grammars, samples, strict=True)
        ]
        if self.trace is None:
            return Batch(samples=list(samples), prefixes=prefixes)
        answers = []
        for sample, prefix, grammar, key in zip(samples, prefixes, grammars, keys, strict=True):
            parsed = self.trace(sample, np.random.default_rng(key))
            answers.append(self.encoder.answer(grammar.render(parsed, prefix.frame)))
        return Batch(samples=list(samples), prefixes=prefixes, answers=answers)


class Shuffled(Sampler[int]):
    """A permutation that is a pure function of (seed, epoch): the order survives any kill. Every rank sees its own share.

    Args:
        length: of the dataset.
        seed: of the run.
        rank, ranks: of this process; shares are equal, and what does not divide is left for another epoch.
    """

    def __init__(self, length: int, seed: int, rank: int, ranks: int) -> None:
        self.length, self.seed, self.rank, self.ranks, self.epoch = length, seed, rank, ranks, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Samples of this rank."""
        return self.length // self.ranks

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank in this epoch's order."""
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        )
        return iter(order[: len(self) * self.ranks][self.rank :: self.ranks].tolist())


class Share(Sampler[int]):
    """Every rank's part of an evaluation set, each index once: no sample is repeated to make the parts equal."""

    def __init__(self, length: int, rank: int, ranks: int) -> None:
        self.indices = range(rank, length, ranks)

    def __len__(self) -> int:
        """Samples of this rank."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """In order."""
        return iter(self.indices)
