"""Protocols: the interfaces by which rooms use each other without imports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from segrl.types import Answer, Completions, Frame, MaskPrompt, Parsed, Prefix, PrefixState, Sample

Message = Mapping[str, object]


class SampleSet(Protocol):
    """A dataset: sized, indexed, and able to name its samples without reading them."""

    @property
    def ids(self) -> Sequence[str]:
        """The ids of all samples, in order, without duplicates."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Read the sample at `index`."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """The language of completions: it asks for them, renders them and parses them."""

    @property
    def says(self) -> frozenset[str]:
        """The features that it can express.

        A subset of "thought", "boxes", "points", "nothing" (no object) and "steps" (it is `Unfolding`).
        """
        ...

    def messages(self, query: str | None) -> list[Message]:
        """Return the chat that asks for a mask prompt; the image's place is `{"type": "image"}`."""
        ...

    def render(self, parsed: Parsed, frame: Frame) -> str:
        """Return the completion that expresses `parsed`, with integer coordinates of `frame`."""
        ...

    def parse(self, text: str, frame: Frame) -> Parsed:
        """Parse a completion in linear time. No text raises an error: faults are values."""
        ...


@runtime_checkable
class Unfolding(Protocol):
    """A grammar that can list the steps by which a mask prompt grows in the text."""

    def unfold(self, text: str, frame: Frame) -> list[tuple[int, MaskPrompt]]:
        """Return the steps of a text in order: where a box or labelled point ends, and the mask prompt so far.

        A step depends only on the text up to its end, whether or not the whole text can be parsed.
        """
        ...


class Encoder(Protocol):
    """The policy's processor and coordinate frame without weights: cheap to copy into loader workers."""

    def encode(self, messages: Sequence[Message], image: np.ndarray) -> Prefix:
        """Return the prefix of a chat and an image, uint8 `[H, W, 3]`."""
        ...

    def answer(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 `[T]`, the stop token last."""
        ...

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Return the N texts of tokens int64 `[N, T]`, read where the token mask bool `[N, T]` is true."""
        ...

    def token_at(self, tokens: Tensor, end: int) -> int:
        """Return the index of the token in int64 `[T]` that completes the first `end` characters."""
        ...


class Policy(Protocol):
    """The MLLM being trained."""

    @property
    def encoder(self) -> Encoder:
        """The encoder that makes its prefixes."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        ...

    def logprobs(
        self, prefixes: Sequence[Prefix], completions: Completions, state: PrefixState | None = None
    ) -> Tensor:
        """Return the log-probability of each completion token, float32 `[N, T]`.

        Each prefix is read once; if `state` is given, it holds the prefixes already read.
        """
        ...


class RolloutEngine(Protocol):
    """An engine that samples completions.

    Attributes:
        prefixes_at_once: number of prefixes decoded together; None for all.
    """

    prefixes_at_once: int | None

    def sample(
        self,
        policy: Policy,
        prefixes: Sequence[Prefix],
        group_size: int,
        seeds: Sequence[int],
        state: PrefixState | None = None,
    ) -> Completions:
        """Sample `group_size` completions of each prefix, groups contiguous, with one seed per completion.

        An engine that reads prefixes itself uses `state`, if given, instead of reading them again.
        """
        ...

    def greedy(self, policy: Policy, prefixes: Sequence[Prefix]) -> Completions:
        """Decode one completion of each prefix greedily."""
        ...


class MaskHead(Protocol):
    """A frozen promptable segmenter."""

    def prepare(self, images: Sequence[np.ndarray]) -> None:
        """Start to encode images, uint8 `[H, W, 3]`, in the background for a later call of `segment`."""
        ...

    def segment(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[MaskPrompt | None]]
    ) -> list[list[np.ndarray]]:
        """Return a mask bool `[H, W]` per prompt of each image; None gives an empty mask.

        Each image is encoded once.
        """
        ...


class RewardTerm(Protocol):
    """A function that gives one number per completion."""

    def __call__(self, answer: Answer, sample: Sample) -> float:
        """Return the reward of an answer to a sample; their masks have the same size."""
        ...


@runtime_checkable
class Sharding(Protocol):
    """A training strategy that shards weights, gradients or optimizer state over the ranks.

    A stage asks its strategy for what differs then; `stages.unsharded` answers for every other strategy.

    Attributes:
        early_graphs: whether a backward pass may reach a graph that was made before the training pass.
        split_groups: whether completions of one prefix may be learned in several passes.
        partial_updates: whether an update may leave some parameters without a gradient.
    """

    early_graphs: bool
    split_groups: bool
    partial_updates: bool

    def whole_weights(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which every rank holds the whole weights of these modules."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip the gradients to `max_norm` and return their L2 norm before, over all shards."""
        ...
