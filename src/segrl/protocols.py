"""The seams: what one room asks of another, without importing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from segrl.types import Answer, Completions, Frame, MaskPrompt, Parsed, Prefix, PrefixState, Sample

Message = Mapping[str, object]


class SampleSet(Protocol):
    """A dataset: sized, indexed, and able to name its samples without reading them."""

    @property
    def ids(self) -> Sequence[str]:
        """Of all samples, in order, each once."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Read one."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """The language of completions: it asks, it writes, it reads."""

    @property
    def says(self) -> frozenset[str]:
        """What it has words for: of "thought", "boxes", "points", "nothing" (no object), "steps" (it is `Unfolding`)."""
        ...

    def messages(self, query: str | None) -> list[Message]:
        """The chat that asks for a mask prompt; the image stands as `{"type": "image"}`."""
        ...

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """The completion that says `parsed`, with integer coordinates of `frame`."""
        ...

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Read a completion in linear time. Raises nothing, whatever the text: faults are values."""
        ...


@runtime_checkable
class Unfolding(Protocol):
    """A grammar that can tell how a mask prompt grows while it is written."""

    def unfold(self, text: str, frame: Frame) -> list[tuple[int, MaskPrompt]]:
        """Where in the text a box or a labelled point is complete, and all that is complete by then, in the order written.

        What a step says depends on the text up to its end alone, whether or not the whole can be parsed.
        """
        ...


class Encoder(Protocol):
    """The policy's eyes and vocabulary without its weights: cheap to copy into loader workers."""

    def encode(self, messages: Sequence[Message], image: np.ndarray) -> Prefix:
        """Chat and image uint8 `[H, W, 3]` to the prefix that a group shares."""
        ...

    def answer(self, text: str) -> Tensor:
        """Text to int64 `[T]`, ending in the stop token."""
        ...

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """int64 `[N, T]` and bool `[N, T]` to N texts."""
        ...

    def token_at(self, tokens: Tensor, end: int) -> int:
        """Which of the tokens int64 `[T]` completes the first `end` characters of their text."""
        ...


class Policy(Protocol):
    """The MLLM being trained."""

    @property
    def encoder(self) -> Encoder:
        """Its eyes and vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        ...

    def logprobs(
        self, prefixes: Sequence[Prefix], completions: Completions, state: PrefixState | None = None
    ) -> Tensor:
        """Log-probability of each completion token, float32 `[N, T]`; each prefix is read once, or was: then `state` has it."""
        ...


class RolloutEngine(Protocol):
    """Samples completions.

    Attributes:
        prefixes_at_once: prefixes whose completions advance together; None takes all.
    """

    prefixes_at_once: int | None

    def sample(
        self, policy: Policy, prefixes: Sequence[Prefix], group_size: int, seeds: Sequence[int],
        state: PrefixState | None = None,
    ) -> Completions:  # fmt: skip
        """`group_size` completions of each prefix, groups contiguous; one seed per completion.

        An engine that reads prefixes itself takes `state` where they have been read.
        """
        ...

    def greedy(self, policy: Policy, prefixes: Sequence[Prefix]) -> Completions:
        """The most likely completion of each prefix."""
        ...


class MaskHead(Protocol):
    """A frozen promptable segmenter."""

    def prepare(self, images: Sequence[np.ndarray]) -> None:
        """Begin to encode images uint8 `[H, W, 3]` that `segment` will be asked about, beside what the caller does next."""
        ...

    def segment(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[MaskPrompt | None]]
    ) -> list[list[np.ndarray]]:
        """Masks bool `[H, W]` of each image's prompts; each image is encoded once. None gives an empty mask."""
        ...


class RewardTerm(Protocol):
    """One named number per completion."""

    def __call__(self, answer: Answer, sample: Sample) -> float:
        """Reward of one answer to one sample; their masks are of one size."""
        ...
