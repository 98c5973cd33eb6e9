"""Sampling by vLLM, in this process: the only file that imports it.

    policy -- weights, an adapter merged, whenever they have moved --> vLLM's own copy
    prefix -- token ids, image features of the policy's own tower  --> n requests that share its cached prefix

The tower runs here: vLLM gets features, not pixels, so there is no second image pipeline that could drift from ours.
Under ranks there would be one engine per rank; that is not there yet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from segrl.models.hf_vlm import HFPolicy
from segrl.models.shared_prefix import pad_right
from segrl.types import Completions, Prefix, PrefixState

_HERE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are handed over, not sent
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's, too
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class VLLMEngine:
    """Samples in a vLLM engine of this process.

    Args:
        max_tokens: a completion is cut off after this many.
        max_prefix: longest prefix in tokens.
        memory: share of the GPU's memory that vLLM may take; on a CPU it takes VLLM_CPU_KVCACHE_SPACE GiB.
        sleep: give a GPU's memory back between rollouts.
        eager: run without CUDA graphs and compilation: starts sooner, decodes slower.

    Raises:
        ValueError: if vLLM is not installed.
    """

    def __init__(self, max_tokens: int, max_prefix: int, memory: float, sleep: bool, eager: bool) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "rollout: vllm needs vLLM, which is not installed: uv sync --no-dev --extra vllm (docs/speed.md)"
            )
        self.max_tokens, self.max_prefix = max_tokens, max_prefix
        self.memory, self.sleep, self.eager = memory, sleep, eager
        self.llm: Any = None
        self.numbers = count()
        self.pushed: int | None = None

    def sample(
        self, policy: HFPolicy, prefixes: Sequence[Prefix], group_size: int, seeds: Sequence[int],
        state: PrefixState | None = None,
    ) -> Completions:  # fmt: skip
        """`group_size` completions of each prefix, groups contiguous; with the log-probabilities they were drawn with."""
        return self._generate(policy, prefixes, group_size, policy.temperature, seeds)

    def greedy(self, policy: HFPolicy, prefixes: Sequence[Prefix]) -> Completions:
        """The most likely token at each place, one completion per prefix."""
        return self._generate(policy, prefixes, 1, 0.0, [0] * len(prefixes))

    @torch.no_grad()
    def _generate(
        self, policy: HFPolicy, prefixes: Sequence[Prefix], group_size: int, temperature: float, seeds: Sequence[int]
    ) -> Completions:  # fmt: skip
        from vllm import SamplingParams

        if (longest := max(len(prefix.token_ids) for prefix in prefixes)) > self.max_prefix:
            raise ValueError(
                f"rollout.max_prefix: at least {longest} tokens are needed for this prefix; got {self.max_prefix}"
            )
        self._wake(policy)
        stops, never = policy.stop_ids.tolist(), policy.never_sampled.tolist()
        for b, prefix in enumerate(prefixes):
            asked = _request(policy, prefix)
            for seed in seeds[b * group_size : (b + 1) * group_size]:
                settings = SamplingParams(
                    temperature=temperature, seed=seed % 2**31, max_tokens=self.max_tokens, stop_token_ids=stops,
                    logit_bias=dict.fromkeys(never, -100.0), logprobs=0, detokenize=False,
                )  # fmt: skip
                self.llm.llm_engine.add_request(str(next(self.numbers)), asked, settings)
        answers = self.llm.wait_for_completion(use_tqdm=False)
        if self.sleep and policy.device.type == "cuda":
            self.llm.sleep(level=2)
        return _completions(policy, prefixes, group_size, answers)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _wake(self, policy: HFPolicy) -> None:
        """The engine, with the policy's weights of this moment.

        Evaluation may be the first to ask, and what is made in inference mode could not be changed later.
        """
        if self.llm is None:
            self.llm = self._start(policy)
        asleep = self.sleep and policy.device.type == "cuda" and self.pushed is not None
        if asleep:
            self.llm.wake_up(tags=["weights"])
        if asleep or policy.moves != self.pushed:  # sleep of level 2 forgets the weights
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.merged()})
            self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()
            self.pushed = policy.moves
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])

    def _start(self, policy: HFPolicy) -> Any:  # noqa: ANN401 - vllm's own class
        if policy.lora is not None and policy.model.dtype != torch.float32:
            raise ValueError(
                f"policy.dtype: float32 is needed by rollout=vllm under policy.lora; got {policy.model.dtype}: merged into such weights a "
                "small adapter is rounded away (or rollout=shared_prefix)"
            )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "rollout: vllm runs on one device so far; got several ranks (rollout=shared_prefix)"
            )
        for key, value in _HERE.items():
            os.environ.setdefault(key, value)
        from vllm import LLM

        threads = torch.get_num_threads()
        try:
            llm = LLM(
                policy.weights, dtype=str(policy.pass_dtype).removeprefix("torch."), enforce_eager=self.eager,
                max_model_len=self.max_prefix + self.max_tokens, gpu_memory_utilization=self.memory, limit_mm_per_prompt={"image": 1},
                enable_mm_embeds=True, distributed_executor_backend="uni", logprobs_mode="processed_logprobs", load_format="dummy",
                enable_sleep_mode=self.sleep and policy.device.type == "cuda", seed=0,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"rollout: vLLM does not start (rollout.memory={self.memory}): {str(error)[:300]}"
            ) from error
        torch.set_num_threads(threads)  # vLLM sets its own, for the whole process
        return llm


def _request(policy: HFPolicy, prefix: Prefix) -> Any:  # noqa: ANN401 - vllm's own type
    """Token ids as they are, and where the image's features go: nothing is left for vLLM's own processor to do."""
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    ids, features = prefix.token_ids.tolist(), policy.features(prefix).cpu()
    first = ids.index(policy.model.config.image_token_id)
    kinds = {
        "image_embeds": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor([len(features)])),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    items = MultiModalKwargsItems.from_hf_inputs(
        {"image_embeds": features, "image_grid_thw": prefix.grid.cpu()}, kinds
    )
    name = hashlib.blake2b(features.float().numpy().tobytes(), digest_size=16).hexdigest()
    place = PlaceholderRange(offset=first, length=len(features))
    return mm_input(ids, items, {"image": [name]}, {"image": [place]})


def _completions(
    policy: HFPolicy, prefixes: Sequence[Prefix], group_size: int, answers: Sequence[Any]
) -> Completions:
    """Of finished requests, in their order."""
    rows, logprobs = [], []
    for n, answer in enumerate(answers):
        assert answer.prompt_token_ids == prefixes[n // group_size].token_ids.tolist(), (
            "vLLM read other tokens than ours"
        )
        (said,) = answer.outputs
        rows.append(torch.tensor(said.token_ids))
        logprobs.append(
            torch.tensor(
                [place[token].logprob for token, place in zip(said.token_ids, said.logprobs, strict=True)]
            )
        )
    tokens, mask = pad_right(rows, policy.pad_id)
    drawn: Tensor = pad_right(logprobs, 0)[0].float()
    tokens, mask, drawn = (t.to(policy.device) for t in (tokens, mask, drawn))
    finished = torch.tensor([a.outputs[0].finish_reason == "stop" for a in answers], device=policy.device)
    return Completions(
        tokens=tokens,
        mask=mask,
        texts=policy.encoder.decode(tokens, mask),
        finished=finished,
        sampled_logprobs=drawn,
    )
