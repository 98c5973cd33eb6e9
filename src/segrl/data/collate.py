"""Samples to batches, in the loader's workers: pixels and tokens are made here, once per sample."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from segrl.data.boundary import reading, reason
from segrl.protocols import Encoder, Grammar
from segrl.types import Batch, Frame, Parsed, Prefix, Sample


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
            _prefix(self.encoder, grammar, sample) for grammar, sample in zip(grammars, samples, strict=True)
        ]
        if self.trace is None:
            return Batch(samples=list(samples), prefixes=prefixes)
        answers = []
        for sample, prefix, grammar, key in zip(samples, prefixes, grammars, keys, strict=True):
            parsed = self.trace(sample, np.random.default_rng(key))
            answers.append(self.encoder.answer(_written(grammar, sample, parsed, prefix.frame)))
        return Batch(samples=list(samples), prefixes=prefixes, answers=answers)


def _prefix(encoder: Encoder, grammar: Grammar, sample: Sample) -> Prefix:
    """One sample as the policy reads it; ValueError naming one that its processor refuses."""
    with reading(sample.id, "an image and a query that the policy's processor takes are needed"):
        return encoder.encode(grammar.messages(sample.query), sample.image)


def _written(grammar: Grammar, sample: Sample, parsed: Parsed, frame: Frame) -> str:
    """The answer to imitate as text; ValueError naming a sample whose trace the grammar cannot write."""
    try:
        return grammar.render(parsed, frame)
    except ValueError as error:
        raise ValueError(f"{sample.id}: {reason(error)}") from None


class Shuffled(Sampler[int]):
    """A permutation per epoch, begun where the run stands: the order is a function of the seed and of the batches done.

    So it survives any kill, and no loader's state has to. Every rank sees its own share.

    Args:
        length: of the dataset.
        batch_size: of this rank; what does not fill a batch is left for another epoch.
        seed: of the run.
        rank, ranks: of this process; shares are equal.
        batches_done: how many batches the run has consumed, asked when an epoch begins or is gone on with.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int, ranks: int, batches_done: Callable[[], int]
    ) -> None:  # fmt: skip
        self.length, self.batch_size, self.seed, self.rank, self.ranks = length, batch_size, seed, rank, ranks
        self.batches_done = batches_done

    def __len__(self) -> int:
        """Samples of this rank in an epoch: whole batches."""
        return self.length // self.ranks // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank that are left of the epoch."""
        epoch, batch = divmod(self.batches_done(), max(1, len(self) // self.batch_size))
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        )
        share = order[: self.length // self.ranks * self.ranks][self.rank :: self.ranks][: len(self)]
        return iter(share[batch * self.batch_size :].tolist())


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
