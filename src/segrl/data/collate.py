"""Collate samples to batches, in loader workers: each sample is preprocessed and tokenised once, here."""

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
    """A function that gives the answer to imitate; see `data.annotator.Annotator`."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Parsed:
        """Return the annotator's answer to a sample."""
        ...


class Collate:
    """A collate function from samples to a batch.

    Args:
        encoder, grammar: the policy's; if one is None, batches have no prefixes (stages without a policy).
        trace: gives the answers to imitate; None if completions are sampled.
        also: grammars to imitate beside `grammar`. A hash of the sample's id picks one of them, the same in
            every epoch.
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
        """Return the batch of B samples: prefixes, and answers if there is a `trace`."""
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
    """Return the prefix of one sample. Raise ValueError, naming the sample, if the processor refuses it."""
    with reading(sample.id, "must be an image and a query that the policy's processor takes"):
        return encoder.encode(grammar.messages(sample.query), sample.image)


def _written(grammar: Grammar, sample: Sample, parsed: Parsed, frame: Frame) -> str:
    """Return the answer to imitate as text. Raise ValueError, naming the sample, if it cannot be rendered."""
    try:
        return grammar.render(parsed, frame)
    except ValueError as error:
        raise ValueError(
            f"{sample.id}: must have an answer that the grammar can write; {reason(error)}"
        ) from None


class ResumableShuffle(Sampler[int]):
    """A sampler with one permutation per epoch that starts at the run's position.

    The order is a function of the seed and of the number of batches done. A resumed run therefore continues
    with the next batch, and a checkpoint holds no loader state. The ranks' shares are disjoint.

    Args:
        length: number of samples of the dataset.
        batch_size: samples of one batch, per rank; an epoch drops the samples that do not fill a batch.
        seed: seed of the run.
        rank, ranks: index of this process and number of processes; all shares have the same size.
        batches_done: returns the number of batches that the run has consumed; called at each `__iter__`.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int, ranks: int, batches_done: Callable[[], int]
    ) -> None:  # fmt: skip
        self.length, self.batch_size, self.seed, self.rank, self.ranks = length, batch_size, seed, rank, ranks
        self.batches_done = batches_done

    def __len__(self) -> int:
        """Return the number of this rank's samples in an epoch, a multiple of the batch size."""
        return self.length // self.ranks // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Return the indices of this rank that remain in the current epoch."""
        epoch, batch = divmod(self.batches_done(), max(1, len(self) // self.batch_size))
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        )
        share = order[: self.length // self.ranks * self.ranks][self.rank :: self.ranks][: len(self)]
        return iter(share[batch * self.batch_size :].tolist())


class EvalShard(Sampler[int]):
    """A sampler of one rank's part of an evaluation set. Each index occurs once: nothing is padded."""

    def __init__(self, length: int, rank: int, ranks: int) -> None:
        self.indices = range(rank, length, ranks)

    def __len__(self) -> int:
        """Return the number of this rank's samples."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """Return the indices `rank`, `rank + ranks`, ... in order."""
        return iter(self.indices)
