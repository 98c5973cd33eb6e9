"""Requests to vLLM and its answers, in this process or over a network.

    prefix -- token ids, image features of the policy's own tower --> one request for n completions

The vision tower runs here and vLLM gets features, so that pixels have a single preprocessing pipeline.
"""

from __future__ import annotations

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segrl.models.kernels.prefix_pass import pad_right
from segrl.protocols import ServedPolicy
from segrl.types import Completions, Prefix, PrefixState

# On a CPU, vLLM cannot sample with seeds after a prefix that it has read in chunks.
WHOLE_PREFIXES = {"enable_chunked_prefill": False, "max_num_batched_tokens": 32768}


class ImageFeatures(NamedTuple):
    """An image for vLLM: features and grid, a key for its caches, first place and number of its tokens."""

    item: Any
    name: str
    first: int
    length: int


class VLLMCompletion(NamedTuple):
    """One completion: its tokens, their log-probabilities, and whether it ends with a stop token."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Engine(ABC):
    """Base of the engines that sample with vLLM, which schedules all completions itself."""

    prefixes_at_once = None

    def sample(
        self, policy: ServedPolicy, prefixes: Sequence[Prefix], group_size: int, seeds: Sequence[int],
        state: PrefixState | None = None,
    ) -> Completions:  # fmt: skip
        """Sample `group_size` completions of each prefix, groups contiguous, with vLLM's log-probabilities.

        The first seed of each group is used; `state` is not.
        """
        return self._generate(policy, prefixes, group_size, policy.temperature, seeds[::group_size])

    def greedy(self, policy: ServedPolicy, prefixes: Sequence[Prefix]) -> Completions:
        """Decode one completion per prefix, with the most likely token at each place."""
        return self._generate(policy, prefixes, 1, 0.0, [0] * len(prefixes))

    @abstractmethod
    def _generate(
        self,
        policy: ServedPolicy,
        prefixes: Sequence[Prefix],
        group_size: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> Completions:
        """Sample with one seed per group; temperature 0 decodes greedily."""


def needs_vllm(rollout: str) -> None:
    """Raise ValueError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"rollout: vLLM must be installed for {rollout}; it is not "
            "(uv sync --no-dev --extra vllm; docs/speed.md)"
        )


def model_length(positions: int, max_prefix: int, max_tokens: int) -> int:
    """Return the largest length of prefix plus completion, at most the policy's number of positions."""
    return min(max_prefix + max_tokens, positions)


def check_lengths(prefixes: Sequence[Prefix], most: int) -> None:
    """Raise ValueError if a prefix has more than `most` tokens."""
    if (longest := max(len(prefix.token_ids) for prefix in prefixes)) > most:
        raise ValueError(
            f"rollout.max_prefix: must be at least {longest}, the tokens of this prefix; got {most}"
        )


def picture(policy: ServedPolicy, prefix: Prefix) -> ImageFeatures:
    """Encode the image of a prefix by the policy's tower, so that vLLM's own processor is not used."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    features = policy.features(prefix).cpu()
    kinds = {
        "image_embeds": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor([len(features)])),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    items = MultiModalKwargsItems.from_hf_inputs(
        {"image_embeds": features, "image_grid_thw": prefix.grid.cpu()}, kinds
    )
    name = hashlib.blake2b(features.float().numpy().tobytes(), digest_size=16).hexdigest()
    first = prefix.token_ids.tolist().index(policy.image_token_id)
    return ImageFeatures(items["image"][0], name, first, len(features))


def settings(
    policy: ServedPolicy, group_size: int, temperature: float, seed: int, max_tokens: int
) -> dict[str, Any]:
    """Return vLLM's sampling parameters for one group; vLLM samples completion g with `seed + g`."""
    return {
        "n": group_size, "temperature": temperature, "seed": seed % 2**31, "max_tokens": max_tokens,
        "logprobs": 0, "detokenize": False, "stop_token_ids": policy.stop_ids.tolist(),
        "logit_bias": dict.fromkeys(policy.never_sampled.tolist(), -100.0),
    }  # fmt: skip


def check_read(prefix: Prefix, read: Sequence[int]) -> None:
    """Assert that `read`, the prompt tokens that vLLM reports, equals the prefix of the training pass."""
    assert list(read) == prefix.token_ids.tolist(), "vLLM read other tokens than ours"


def completions(policy: ServedPolicy, said: Sequence[VLLMCompletion]) -> Completions:
    """Return N completions, groups contiguous, with the log-probabilities that vLLM reported."""
    tokens, mask = pad_right([torch.tensor(row.tokens) for row in said], policy.pad_id)
    drawn: Tensor = pad_right([torch.tensor(row.logprobs) for row in said], 0)[0].float()
    tokens, mask, drawn = (part.to(policy.device) for part in (tokens, mask, drawn))
    return Completions(
        tokens=tokens,
        mask=mask,
        texts=policy.encoder.decode(tokens, mask),
        finished=torch.tensor([row.finished for row in said], device=policy.device),
        sampled_logprobs=drawn,
    )
