"""Protocols: the interfaces by which rooms use each other without imports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

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
        """Return the steps of a text in order: where a box or point ends, and the mask prompt so far.

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


@runtime_checkable
class Policy(Protocol):
    """The MLLM being trained: what everything that holds a policy needs of it.

    `DecodablePolicy`, `ServedPolicy` and `TrainablePolicy` add what one kind of user needs.
    """

    @property
    def encoder(self) -> Encoder:
        """The encoder that makes its prefixes."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        ...


class StepDecoder(Protocol):
    """The state of N = B*G completions that are decoded token by token.

    Attributes:
        groups: number of groups, B.
        group: completions per group, G.
    """

    groups: int
    group: int

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens int64 `[N]` and return the hidden states `[N, D]` that predict the next ones."""
        ...

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Drop completions: keep groups int64 `[B']` and of each the completions `rows`, int64 `[B', G']`."""
        ...


@runtime_checkable
class DecodablePolicy(Policy, Protocol):
    """A policy from which `rollout.shared_prefix` samples.

    Attributes:
        pad_id: token id behind the end of a completion.
    """

    pad_id: int

    @property
    def stop_ids(self) -> Tensor:
        """The token ids that end a completion, int64 `[S]`."""
        ...

    def prefill(self, prefixes: Sequence[Prefix]) -> PrefixState:
        """Read every prefix once."""
        ...

    def decoder(
        self,
        state: PrefixState,
        group_size: int,
        length: int,
        stride: int | None = None,
        recorder: Any = None,  # noqa: ANN401 - models.kernels.cuda_graph.GraphRecorder
    ) -> StepDecoder:
        """Return a decoder of `group_size` completions behind each prefix, of at most `length` tokens.

        `stride` and `recorder` are for CUDA graphs: tokens for which a captured step is valid, and the object
        that captures steps. A policy that knows no graphs ignores them.
        """
        ...

    def head(self) -> Any:  # noqa: ANN401 - passed on to `logits`
        """Return the output layer, prepared once for all steps of a rollout."""
        ...

    def logits(self, hidden: Tensor, head: Any) -> Tensor:  # noqa: ANN401
        """Return float32 logits `[N, V]` at the sampling temperature; -inf where nothing is sampled."""
        ...


@runtime_checkable
class ServedPolicy(Policy, Protocol):
    """A policy that vLLM serves: its folder, its settings, and the transfer of its weights.

    Attributes:
        weights: Hugging Face folder from which vLLM loads the architecture.
        temperature: of sampling.
        pad_id: token id behind the end of a completion.
        weights_version: counter of changes of the weights; an engine that holds an older one is out of date.
    """

    weights: str
    temperature: float
    pad_id: int
    weights_version: int

    @property
    def stop_ids(self) -> Tensor:
        """The token ids that end a completion, int64 `[S]`."""
        ...

    @property
    def never_sampled(self) -> Tensor:
        """The token ids that have no probability, int64 `[K]`."""
        ...

    @property
    def pass_dtype(self) -> torch.dtype:
        """The dtype of a forward pass."""
        ...

    @property
    def most_positions(self) -> int:
        """The number of positions of the language model."""
        ...

    @property
    def image_token_id(self) -> int:
        """The id of the placeholder that stands for one image token."""
        ...

    def features(self, prefix: Prefix) -> Tensor:
        """Return the image tokens of a prefix, as the vision tower gives them, `[n, D]`."""
        ...

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight with its name in a Hugging Face folder, adapters merged."""
        ...

    def fingerprint(self) -> str:
        """Return a name for the present weights, the same on every rank and in every run."""
        ...


@runtime_checkable
class TrainablePolicy(Policy, Protocol):
    """A policy that the stages train; it is a `torch.nn.Module`, too.

    Attributes:
        pad_id: token id behind the end of a completion.
        lora: settings of the adapter that is trained in place of the weights; None without one.
        gradient_checkpointing: whether the backward pass recomputes activations.
    """

    pad_id: int
    lora: Any
    gradient_checkpointing: bool

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by name, as `torch.nn.Module` does."""
        ...

    def prefill(self, prefixes: Sequence[Prefix]) -> PrefixState:
        """Read every prefix once, with the graph of a backward pass."""
        ...

    def read(
        self, prefixes: Sequence[Prefix], completions: Completions, state: PrefixState | None = None
    ) -> Tensor:
        """Return the hidden state that predicts each completion token, `[N, T, D]`.

        Each prefix is read once for its group; if `state` is given, it holds the prefixes already read.
        """
        ...

    def logprobs_of(self, hidden: Tensor, completions: Completions) -> Tensor:
        """Return the log-probability of each completion token, float32 `[N, T]`, from `read`'s states."""
        ...

    def logprobs(
        self, prefixes: Sequence[Prefix], completions: Completions, state: PrefixState | None = None
    ) -> Tensor:
        """Return `logprobs_of` the states that `read` returns."""
        ...

    def load_policy(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of an earlier stage. Raise ValueError if their architecture differs."""
        ...

    def bump_version(self) -> None:
        """Count a change of the weights."""
        ...

    @property
    def hidden_size(self) -> int:
        """The width D of the hidden states that `read` returns."""
        ...

    @property
    def output_layer(self) -> nn.Module | None:
        """The layer that gives the logits, always in float32; None if the policy has no such layer."""
        ...


@runtime_checkable
class AdaptablePolicy(TrainablePolicy, Protocol):
    """A policy with a low-rank adapter: what `reference=adapter_off` and a critic's own adapter need."""

    def add_adapter(self, name: str, lora: Any) -> None:  # noqa: ANN401 - models.hf_vlm.Lora
        """Add an adapter; it starts as the identity."""
        ...

    def adapter_active(self, adapter: str | None) -> AbstractContextManager[None]:
        """Return a context with `adapter` active; if None, with all off. It restores the policy's own."""
        ...

    def activate_policy_adapter(self) -> None:
        """Activate the policy's adapter; the parameters of all adapters are trained."""
        ...


class RolloutEngine(Protocol):
    """An engine that samples completions.

    Each engine says which kind of policy it needs: `DecodablePolicy` or `ServedPolicy`.

    Attributes:
        prefixes_at_once: number of prefixes decoded together; None for all.
    """

    prefixes_at_once: int | None

    def sample(
        self,
        policy: Any,  # noqa: ANN401
        prefixes: Sequence[Prefix],
        group_size: int,
        seeds: Sequence[int],
        state: PrefixState | None = None,
    ) -> Completions:
        """Sample `group_size` completions of each prefix, groups contiguous, with one seed per completion.

        An engine that reads prefixes itself uses `state`, if given, instead of reading them again.
        """
        ...

    def greedy(self, policy: Any, prefixes: Sequence[Prefix]) -> Completions:
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
class RememberingTerm(RewardTerm, Protocol):
    """A reward term whose value also depends on earlier answers; its memory enters the checkpoint."""

    def remembered(self) -> list[float]:
        """Return the memory."""
        ...

    def remember(self, values: list[float]) -> None:
        """Restore the memory from a checkpoint."""
        ...

    def settle(self) -> None:
        """Take the values of the present rollout into the memory; called once all its answers are scored."""
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
