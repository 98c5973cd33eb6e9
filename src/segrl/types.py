"""The nouns of the house: frozen carriers that rooms hand to each other.

Axes: B samples, G group, N = B*G (groups contiguous), P prompt tokens, T completion tokens, K boxes,
Q points, H W pixels. Coordinates are unit xy: (0, 0) is the image's top left corner, (1, 1) its bottom right.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image with its ground truth and its question."""

    id: str
    image: np.ndarray
    """uint8 `[H, W, 3]`, RGB."""
    mask: np.ndarray
    """bool `[H, W]`, true on the object."""
    query: str | None = None
    """What to segment; none where the task's constant instruction says it all."""
    objects: np.ndarray | None = None
    """bool `[n, H, W]`, the mask's objects one by one; none where the dataset does not tell them apart."""
    ignore: np.ndarray | None = None
    """bool `[H, W]`, pixels that no score looks at; none where all count."""
    path: Path | None = None
    """File of the image; none where it was drawn."""
    trace: Parsed | None = None
    """What an annotator answered, where the dataset has it; such samples may have an empty mask."""
    cluster: str | None = None
    """What samples that are not independent have in common: their image. Intervals draw a cluster with all of its samples.
    `None` where no other sample of the dataset is of the same image."""

    def counted(self, mask: np.ndarray) -> np.ndarray:
        """A mask bool `[H, W]` without the pixels that no score looks at."""
        return mask if self.ignore is None else mask & ~self.ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPrompt:
    """What a promptable segmenter is told, in unit coordinates.

    Example: one box over the left half with one foreground point at its centre is
    `MaskPrompt(boxes=[[0, 0, .5, 1]], points=[[.25, .5]], labels=[1])`.
    """

    boxes: np.ndarray
    """float32 `[K, 4]`, x1 y1 x2 y2 with x1 < x2 and y1 < y2."""
    points: np.ndarray
    """float32 `[Q, 2]`, x y."""
    labels: np.ndarray
    """int64 `[Q]`, 1 foreground, 0 background."""
    paired: bool = False
    """Whether point k is of box k alone (K = Q); if not, a point is of every box that holds it."""

    @classmethod
    def of(
        cls, boxes: object = (), points: object = (), labels: object = (), paired: bool = False
    ) -> MaskPrompt:
        """Build from nested sequences; shapes are fixed even when empty."""
        return cls(
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            points=np.asarray(points, np.float32).reshape(-1, 2),
            labels=np.asarray(labels, np.int64).reshape(-1),
            paired=paired,
        )


class ParseFault(enum.Enum):
    """Why a completion is not a sentence of its grammar. A fault is data: rewards price it, figures count it."""

    NO_THOUGHT = "no closed <think>"
    NO_ANSWER = "no closed <answer>, or nothing behind the thought"
    BAD_JSON = "an answer that is no JSON of the right shape"
    NO_BOX = "no closed <bbox>"
    NO_POINTS = "no closed <points>"
    NO_LABELS = "no closed <labels>"
    DUPLICATE_FIELD = "a field that may stand once stands twice"
    BAD_NUMBERS = "not a list of numbers of the right shape"
    BAD_LABEL = "a label that is neither 0 nor 1"
    LABEL_COUNT = "as many labels as points are needed"
    DEGENERATE_BOX = "a box without area inside the image"
    TOO_MANY = "more boxes or points than the grammar allows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A completion, understood: a mask prompt, or the fault that stands in its place."""

    thought: str = ""
    prompt: MaskPrompt | None = None
    fault: ParseFault | None = None
    rest: str = ""
    """What stands behind the answer (in JSON, in front of the thought, too), beside a fault, too; it does not spoil the answer."""
    loose: bool = False
    """Whether the answer was read although it is not written as the grammar asks; no format reward pays for it."""
    partly: float = 0.0
    """Beside a fault, or loosely read: the share of fields of the right shape, 0..1, where the grammar counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion, understood and drawn: all that a reward or a metric may look at."""

    text: str
    parsed: Parsed
    mask: np.ndarray
    """bool `[H, W]` of the image's own size; empty where the completion could not be parsed."""
    length: int
    """Tokens spent."""
    finished: bool
    """Whether it ended by itself, and was not cut off at the limit."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The coordinate frame in which a policy writes about one image: x runs 0..width, y 0..height."""

    width: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """One sample as the policy reads it: made once, in a loader worker, and shared by the whole group."""

    token_ids: Tensor
    """int64 `[P]`, image placeholders expanded, no padding."""
    token_types: Tensor
    """int64 `[P]`, 1 on image tokens: without it the rotary positions are silently one-dimensional."""
    pixels: Tensor
    """float `[patches, patch values]`, the image processor's output."""
    positions: Tensor
    """int64 `[3, P]`, rotary positions along time, height, width."""
    grid: Tensor
    """int64 `[1, 3]`, patches along time, height, width; stays on the host, where layouts are made."""
    frame: Frame

    def to(self, device: torch.device | str) -> Prefix:
        """Return the same prefix with its tensors on `device`, but for the grid."""
        return replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=True),
            token_types=self.token_types.to(device, non_blocking=True),
            pixels=self.pixels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Prefix:
        """The same in memory that a GPU copies from while the host goes on."""
        return replace(
            self,
            token_ids=self.token_ids.pin_memory(),
            token_types=self.token_types.pin_memory(),
            pixels=self.pixels.pin_memory(),
            positions=self.positions.pin_memory(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixState:
    """B prefixes as the language model has read them."""

    keys: list[Tensor]
    """Of each layer `[B, K, P, d]`, K heads of width d, rotated to their positions."""
    values: list[Tensor]
    """Likewise."""
    seen: Tensor
    """bool `[B, P]`, false on padding."""
    following: Tensor
    """int64 `[B]`, rotary position of the first completion token: images advance it by their side, not their area."""
    last_hidden: Tensor
    """`[B, D]`, hidden state that predicts the first completion token."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that gradients flow through."""
        return [*self.keys, *self.values, self.last_hidden]

    def cut(self) -> PrefixState:
        """The same as leaves, in which gradients gather without flowing on."""
        keys, values, last = (
            [t.detach().requires_grad_(t.requires_grad) for t in part]
            for part in (self.keys, self.values, [self.last_hidden])
        )
        return PrefixState(
            keys=keys, values=values, seen=self.seen, following=self.following, last_hidden=last[0]
        )

    def gathered(self, leaves: PrefixState) -> Tensor:
        """A scalar whose gradient with respect to this state is what its `cut()` leaves have gathered."""
        pairs = zip(self.tensors, leaves.tensors, strict=True)
        met = [(t * leaf.grad).sum() for t, leaf in pairs if leaf.grad is not None]
        return torch.stack(met).sum() if met else self.last_hidden.new_zeros(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples and their prefixes. Images stay a list: sizes differ."""

    samples: list[Sample]
    prefixes: list[Prefix]
    answers: list[Tensor] | None = None
    """int64 `[T_i]` each: the completion to imitate, where the stage imitates."""

    def __len__(self) -> int:
        """B."""
        return len(self.samples)

    def take(self, places: Sequence[int]) -> Batch:
        """Some of the samples, in the given order."""
        return replace(
            self,
            samples=[self.samples[b] for b in places],
            prefixes=[self.prefixes[b] for b in places],
            answers=None if self.answers is None else [self.answers[b] for b in places],
        )

    def pin_memory(self) -> Batch:
        """See `Prefix.pin_memory`; a loader's thread asks for it."""
        answers = None if self.answers is None else [a.pin_memory() for a in self.answers]
        return replace(self, prefixes=[p.pin_memory() for p in self.prefixes], answers=answers)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Move what the policy reads; pixels of the samples stay on the host until the mask head wants them."""
        answers = (
            None if self.answers is None else [a.to(device, non_blocking=non_blocking) for a in self.answers]
        )
        return replace(self, prefixes=[p.to(device) for p in self.prefixes], answers=answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What the policy wrote: N = B*G token rows, groups contiguous, right-padded."""

    tokens: Tensor
    """int64 `[N, T]`."""
    mask: Tensor
    """bool `[N, T]`, true up to and including the stop token."""
    texts: list[str]
    """N strings, special tokens left out."""
    finished: Tensor
    """bool `[N]`, true where the last token is a stop token; the others were cut off."""
    sampled_logprobs: Tensor | None = None
    """float32 `[N, T]`, of another engine's own; none where the policy itself sampled."""

    @property
    def lengths(self) -> Tensor:
        """int64 `[N]`, tokens each completion spent."""
        return self.mask.sum(1)

    def rows(self, rows: slice) -> Completions:
        """A run of completions."""
        return self.take(list(range(*rows.indices(len(self.texts) or len(self.tokens)))))

    def take(self, rows: Sequence[int]) -> Completions:
        """Some of the completions, in the given order."""
        drawn = self.sampled_logprobs
        return Completions(
            tokens=self.tokens[rows], mask=self.mask[rows], texts=[self.texts[n] for n in rows] if self.texts else [],
            finished=self.finished[rows], sampled_logprobs=None if drawn is None else drawn[rows],
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[Completions]) -> Completions:
        """One after the other, padded to the longest."""
        longest = max(part.tokens.shape[1] for part in parts)

        def widened(rows: Tensor) -> Tensor:
            return torch.nn.functional.pad(rows, (0, longest - rows.shape[1]))

        return cls(
            tokens=torch.cat([widened(part.tokens) for part in parts]),
            mask=torch.cat([widened(part.mask) for part in parts]),
            texts=[text for part in parts for text in part.texts],
            finished=torch.cat([part.finished for part in parts]),
            sampled_logprobs=None if parts[0].sampled_logprobs is None else torch.cat([
                widened(part.sampled_logprobs) for part in parts if part.sampled_logprobs is not None
            ]),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The reward of every completion, whole and by term."""

    total: Tensor
    """float32 `[B, G]`."""
    terms: dict[str, Tensor]
    """Each float32 `[B, G]`, unweighted, keyed by the term's name in the config."""

    def take(self, places: Sequence[int]) -> Scores:
        """Of some samples, in the given order."""
        return Scores(
            total=self.total[places], terms={name: value[places] for name, value in self.terms.items()}
        )

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """One after the other."""
        return cls(
            total=torch.cat([part.total for part in parts]),
            terms={name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """Every frozen tensor that the update needs."""

    prefixes: list[Prefix]
    """B of them."""
    completions: Completions
    counts: Tensor
    """bool `[N, T]`, tokens that count in the loss."""
    advantages: Tensor
    """float32 `[N, T]`."""
    old_logprobs: Tensor | None = None
    """float32 `[N, T]`, or none with one update per rollout: then old is new, detached."""
    reference_logprobs: Tensor | None = None
    """float32 `[N, T]`, or none where nothing is measured against a reference."""
    values: Tensor | None = None
    """float32 `[N, T]`, what the critic expected before each token; none without a critic."""
    returns: Tensor | None = None
    """float32 `[N, T]`, what it should have expected."""
    insight: Tensor | None = None
    """float32 `[N, I]`, what only the critic is told; none where it is told nothing."""
    state: PrefixState | None = None
    """The prefixes as the policy has read them, for gradients to flow into; none where they are still to be read."""

    @property
    def group_size(self) -> int:
        """Completions per sample."""
        return len(self.advantages) // len(self.prefixes)

    def split(self, size: int) -> Iterator[tuple[Experience, list[int]]]:
        """Runs of at most `size` samples, each with its rows of N. Groups stay whole."""
        group = self.group_size
        for start in range(0, len(self.prefixes), size):
            prefixes = self.prefixes[start : start + size]
            rows = list(range(start * group, (start + len(prefixes)) * group))
            yield self._of(prefixes, rows), rows

    def pieces(self, count: int | None) -> Iterator[tuple[Experience, list[int]]]:
        """Runs of at most `count` completions of every group, each with its rows of N; none takes groups whole."""
        group = self.group_size
        for start in range(0, group, count or group):
            places = range(start, min(start + (count or group), group))
            rows = [b * group + g for b in range(len(self.prefixes)) for g in places]
            yield self._of(self.prefixes, rows), rows

    def _of(self, prefixes: list[Prefix], rows: list[int]) -> Experience:
        if len(rows) == len(self.advantages):
            return self
        assert self.state is None or prefixes is self.prefixes, "what was read in one pass is learned in one"
        tensors: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in (
                "counts",
                "advantages",
                "old_logprobs",
                "reference_logprobs",
                "values",
                "returns",
                "insight",
            )
        }
        return replace(self, prefixes=prefixes, completions=self.completions.take(rows), **tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """An objective's value and what it saw on the way."""

    loss: Tensor
    """Scalar, differentiable."""
    stats: dict[str, Tensor]
    """Scalars, detached; summed over the parts of one update."""
