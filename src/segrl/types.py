"""Frozen dataclasses that the rooms of segrl pass to each other.

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
    """One image with its ground truth and its query."""

    id: str
    image: np.ndarray
    """uint8 `[H, W, 3]`, RGB."""
    mask: np.ndarray
    """bool `[H, W]`, true on the object."""
    query: str | None = None
    """The object to segment. None if the task has one constant instruction."""
    objects: np.ndarray | None = None
    """bool `[n, H, W]`, one mask per object. None if the dataset does not separate the objects."""
    ignore: np.ndarray | None = None
    """bool `[H, W]`, pixels that scores ignore. None if all pixels count."""
    path: Path | None = None
    """File of the image. None if the image was generated."""
    trace: Parsed | None = None
    """The answer of an annotator, if the dataset has one. Such a sample's mask may be empty."""
    cluster: str | None = None
    """Name shared by all samples of one image, which are not independent: intervals resample clusters.
    If None, the sample is a cluster of its own."""

    def counted(self, mask: np.ndarray) -> np.ndarray:
        """Return a mask bool `[H, W]` that is false on the ignored pixels."""
        return mask if self.ignore is None else mask & ~self.ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPrompt:
    """Boxes and labelled points for a promptable segmenter, in unit coordinates.

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
    """Whether point k belongs to box k alone (K = Q). If not, it belongs to every box that contains it."""

    @classmethod
    def of(
        cls, boxes: object = (), points: object = (), labels: object = (), paired: bool = False
    ) -> MaskPrompt:
        """Build a mask prompt from nested sequences; empty ones get shapes `[0, 4]`, `[0, 2]`, `[0]`."""
        return cls(
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            points=np.asarray(points, np.float32).reshape(-1, 2),
            labels=np.asarray(labels, np.int64).reshape(-1),
            paired=paired,
        )


class ParseFault(enum.Enum):
    """The reason why a completion cannot be parsed: a value that rewards price and logged scalars count."""

    NO_THOUGHT = "no closed <think>"
    NO_ANSWER = "no closed <answer>, or nothing behind the thought"
    BAD_JSON = "an answer that is no JSON of the right shape"
    NO_BOX = "no closed <bbox>"
    NO_POINTS = "no closed <points>"
    NO_LABELS = "no closed <labels>"
    DUPLICATE_FIELD = "a field stands twice that may stand once"
    BAD_NUMBERS = "not a list of numbers of the right shape"
    BAD_LABEL = "a label that is neither 0 nor 1"
    LABEL_COUNT = "not as many labels as points"
    DEGENERATE_BOX = "a box without area inside the image"
    TOO_MANY = "more boxes or points than the grammar allows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A parsed completion: a mask prompt, or a fault in its place."""

    thought: str = ""
    prompt: MaskPrompt | None = None
    fault: ParseFault | None = None
    rest: str = ""
    """Text after the answer; in JSON grammars, also before the thought. It is no fault by itself."""
    loose: bool = False
    """Whether the answer deviates from the grammar but was read all the same: it earns no format reward."""
    partly: float = 0.0
    """For a fault or loose answer: share of fields of the right shape, 0..1, if the grammar counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion, parsed, with its mask: the whole input of rewards and metrics."""

    text: str
    parsed: Parsed
    mask: np.ndarray
    """bool `[H, W]` of the image's own size; all false if the completion could not be parsed."""
    length: int
    """Tokens of the completion, the stop token included."""
    finished: bool
    """Whether the last token is a stop token; if not, the completion was cut off at the limit."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The coordinates in which a policy writes about one image: x in 0..width, y in 0..height."""

    width: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """One sample as the policy reads it: made in a loader worker, shared by the whole group."""

    token_ids: Tensor
    """int64 `[P]`, image placeholders expanded, no padding."""
    token_types: Tensor
    """int64 `[P]`, 1 on image tokens. Without it, transformers silently makes 1-D position ids."""
    pixels: Tensor
    """float `[patches, patch values]`, the image processor's output."""
    positions: Tensor
    """int64 `[3, P]`, position ids along time, height, width."""
    grid: Tensor
    """int64 `[1, 3]`, patches along time, height, width. It stays on the CPU, where layouts are computed."""
    frame: Frame

    def to(self, device: torch.device | str) -> Prefix:
        """Return the prefix with all tensors except the grid on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=True),
            token_types=self.token_types.to(device, non_blocking=True),
            pixels=self.pixels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Prefix:
        """Return the prefix with all tensors except the grid in pinned memory."""
        return replace(
            self,
            token_ids=self.token_ids.pin_memory(),
            token_types=self.token_types.pin_memory(),
            pixels=self.pixels.pin_memory(),
            positions=self.positions.pin_memory(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixState:
    """Keys, values and last hidden states of B prefixes that the language model has read."""

    keys: list[Tensor]
    """Per layer `[B, K, P, d]`: K heads of width d, with RoPE applied."""
    values: list[Tensor]
    """Per layer `[B, K, P, d]`."""
    attention_mask: Tensor
    """Attention mask, bool `[B, P]`, false on padding."""
    next_position: Tensor
    """int64 `[B]`, position id of the first completion token. An image advances it by its longer side."""
    last_hidden: Tensor
    """`[B, D]`, hidden state that predicts the first completion token, after the final norm."""

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that gradients flow through."""
        return [*self.keys, *self.values, self.last_hidden]

    def detached(self) -> PrefixState:
        """Return a detached copy: backward passes stop at its tensors and accumulate in their `.grad`."""
        keys, values, last = (
            [t.detach().requires_grad_(t.requires_grad) for t in part]
            for part in (self.keys, self.values, [self.last_hidden])
        )
        return PrefixState(
            keys=keys,
            values=values,
            attention_mask=self.attention_mask,
            next_position=self.next_position,
            last_hidden=last[0],
        )

    def chain_gradient(self, leaves: PrefixState) -> Tensor:
        """Return the scalar `sum(t * leaf.grad)` over the tensors t of this state and their detached leaves.

        Its backward pass sends the gradients accumulated in the leaves on into this state.
        """
        pairs = zip(self.tensors, leaves.tensors, strict=True)
        met = [(t * leaf.grad).sum() for t, leaf in pairs if leaf.grad is not None]
        return torch.stack(met).sum() if met else self.last_hidden.new_zeros(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples and their prefixes, as lists: images and prefixes differ in size."""

    samples: list[Sample]
    prefixes: list[Prefix]
    answers: list[Tensor] | None = None
    """int64 `[T_i]` each: the completions to imitate. None if the stage samples completions."""

    def __len__(self) -> int:
        """Return B."""
        return len(self.samples)

    def take(self, places: Sequence[int]) -> Batch:
        """Return the samples at `places`, in that order."""
        return replace(
            self,
            samples=[self.samples[b] for b in places],
            prefixes=[self.prefixes[b] for b in places],
            answers=None if self.answers is None else [self.answers[b] for b in places],
        )

    def pin_memory(self) -> Batch:
        """Return the batch with pinned prefixes and answers; the data loader's pinning thread calls it."""
        answers = None if self.answers is None else [a.pin_memory() for a in self.answers]
        return replace(self, prefixes=[p.pin_memory() for p in self.prefixes], answers=answers)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Return the batch with prefixes and answers on `device`; the samples stay on the CPU."""
        answers = (
            None if self.answers is None else [a.to(device, non_blocking=non_blocking) for a in self.answers]
        )
        return replace(self, prefixes=[p.to(device) for p in self.prefixes], answers=answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """N = B*G token rows written by the policy, groups contiguous, padded on the right."""

    tokens: Tensor
    """int64 `[N, T]`."""
    mask: Tensor
    """Token mask, bool `[N, T]`, true on sampled tokens up to and including the stop token."""
    texts: list[str]
    """N strings without special tokens."""
    finished: Tensor
    """bool `[N]`, true where the last token is a stop token; the others were cut off."""
    sampled_logprobs: Tensor | None = None
    """float32 `[N, T]`, reported by another engine. None if the policy itself sampled."""

    @property
    def lengths(self) -> Tensor:
        """int64 `[N]`, sampled tokens of each completion."""
        return self.mask.sum(1)

    def rows(self, rows: slice) -> Completions:
        """Return the completions of a slice of rows."""
        return self.take(list(range(*rows.indices(len(self.texts) or len(self.tokens)))))

    def take(self, rows: Sequence[int]) -> Completions:
        """Return the completions of some rows, in the given order."""
        drawn = self.sampled_logprobs
        return Completions(
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            texts=[self.texts[n] for n in rows] if self.texts else [],
            finished=self.finished[rows],
            sampled_logprobs=None if drawn is None else drawn[rows],
        )

    @classmethod
    def joined(cls, parts: Sequence[Completions]) -> Completions:
        """Return all completions in one, padded with zeros to the longest."""
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
    """The reward of every completion: the weighted total and each term."""

    total: Tensor
    """float32 `[B, G]`."""
    terms: dict[str, Tensor]
    """float32 `[B, G]` each, unweighted, keyed by the term's name in the configuration."""

    def take(self, places: Sequence[int]) -> Scores:
        """Return the scores of the samples at `places`, in that order."""
        return Scores(
            total=self.total[places], terms={name: value[places] for name, value in self.terms.items()}
        )

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Return all scores in one, samples in order."""
        return cls(
            total=torch.cat([part.total for part in parts]),
            terms={name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """The frozen tensors that an update needs."""

    prefixes: list[Prefix]
    """B prefixes."""
    completions: Completions
    loss_mask: Tensor
    """Loss mask, bool `[N, T]`, true on tokens that count in the loss."""
    advantages: Tensor
    """float32 `[N, T]`."""
    old_logprobs: Tensor | None = None
    """float32 `[N, T]`. If None (one update per rollout), the update detaches its own."""
    reference_logprobs: Tensor | None = None
    """float32 `[N, T]`. None without a reference."""
    values: Tensor | None = None
    """float32 `[N, T]`, the critic's value before each token, at sampling time. None without a critic."""
    returns: Tensor | None = None
    """float32 `[N, T]`, the critic's targets. None without a critic."""
    privileged: Tensor | None = None
    """float32 `[N, I]`, privileged input of the critic. None if it has none."""
    state: PrefixState | None = None
    """The prefixes as the policy has read them, with their graph. If None, the update reads the prefixes."""

    @property
    def group_size(self) -> int:
        """The number of completions per sample."""
        return len(self.advantages) // len(self.prefixes)

    def split(self, size: int) -> Iterator[tuple[Experience, list[int]]]:
        """Yield parts of at most `size` consecutive samples with whole groups, and each part's rows of N."""
        group = self.group_size
        for start in range(0, len(self.prefixes), size):
            prefixes = self.prefixes[start : start + size]
            rows = list(range(start * group, (start + len(prefixes)) * group))
            yield self._of(prefixes, rows), rows

    def chunks(self, count: int | None) -> Iterator[tuple[Experience, list[int]]]:
        """Yield parts of at most `count` completions of every group, and each part's rows of N.

        If `count` is None, yield one part with all completions.
        """
        group = self.group_size
        for start in range(0, group, count or group):
            places = range(start, min(start + (count or group), group))
            rows = [b * group + g for b in range(len(self.prefixes)) for g in places]
            yield self._of(self.prefixes, rows), rows

    def _of(self, prefixes: list[Prefix], rows: list[int]) -> Experience:
        if len(rows) == len(self.advantages):
            return self
        assert self.state is None or prefixes is self.prefixes, (
            "prefixes that share a state are updated in one pass"
        )
        tensors: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in (
                "loss_mask", "advantages", "old_logprobs", "reference_logprobs", "values", "returns",
                "privileged",
            )
        }  # fmt: skip
        return replace(self, prefixes=prefixes, completions=self.completions.take(rows), **tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss and the scalars to log with it."""

    loss: Tensor
    """Scalar, differentiable."""
    stats: dict[str, Tensor]
    """Detached scalars, summed over the micro-batches of one update."""
