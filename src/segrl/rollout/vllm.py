"""Sample with vLLM in this process: one engine per rank, on the policy's device.

policy -- changed weights, adapter merged --------------> vLLM's own copy    (vllm_weights.py)
prefix -- one request per group, with a cached prefix --> n completions      (vllm_wire.py)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from segrl.protocols import ServedPolicy
from segrl.rollout import vllm_wire as wire
from segrl.types import Completions, Prefix

_HERE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights are passed by reference
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # each transfer warns of layers that have no weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same threads
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class VLLMEngine(wire.Engine):
    """Samples in a vLLM engine of this process.

    Args:
        max_tokens: a completion is cut off after this many.
        max_prefix: longest prefix in tokens.
        memory: share of the GPU's memory that vLLM may use; on a CPU, its cache takes
            VLLM_CPU_KVCACHE_SPACE GiB.
        sleep: whether vLLM releases the GPU's memory between rollouts.
        eager: whether to run without CUDA graphs and compilation: faster to start, slower to decode.

    Raises:
        ValueError: if vLLM is not installed.
    """

    def __init__(self, max_tokens: int, max_prefix: int, memory: float, sleep: bool, eager: bool) -> None:
        wire.needs_vllm("vllm")
        self.max_tokens, self.max_prefix = max_tokens, max_prefix
        self.memory, self.sleep, self.eager = memory, sleep, eager
        self.llm: Any = None
        self.numbers = count()
        self.pushed: int | None = None

    @torch.no_grad()
    def _generate(
        self,
        policy: ServedPolicy,
        prefixes: Sequence[Prefix],
        group_size: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> Completions:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wire.check_lengths(prefixes, self.max_prefix)
        self._wake(policy)
        for prefix, seed in zip(prefixes, seeds, strict=True):
            asked = SamplingParams(
                **wire.settings(policy, group_size, temperature, seed, self.max_tokens),
                output_kind=RequestOutputKind.FINAL_ONLY,  # one answer per group, when all of it is done
            )
            number = str(next(self.numbers))  # vLLM sorts its answers by this number
            self.llm.llm_engine.add_request(number, _request(policy, prefix), asked)
        answers = self.llm.wait_for_completion(use_tqdm=False)
        if self.sleep and policy.device.type == "cuda":
            self.llm.sleep(level=2)
        for prefix, answer in zip(prefixes, answers, strict=True):
            wire.check_read(prefix, answer.prompt_token_ids)
        assert all(len(answer.outputs) == group_size for answer in answers)
        return wire.completions(policy, [_said(one) for answer in answers for one in answer.outputs])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _wake(self, policy: ServedPolicy) -> None:
        """Start or wake the engine, and load the policy's weights if they have changed.

        Inference mode is off here: tensors created in it, when an evaluation is the first caller, could not
        be updated later.
        """
        if self.llm is None:
            self.llm = self._start(policy)
        asleep = self.sleep and policy.device.type == "cuda" and self.pushed is not None
        if asleep:
            self.llm.wake_up(tags=["weights"])
        if asleep or policy.weights_version != self.pushed:  # level 2 of sleep discards the weights
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"weights": policy.merged()}})
            self.llm.finish_weight_update()
            self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()
            self.pushed = policy.weights_version
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])

    def _start(self, policy: ServedPolicy) -> Any:  # noqa: ANN401 - vllm's own class
        """Start an engine with random weights on the policy's device; raise ValueError if that fails."""
        for key, value in _HERE.items():
            os.environ.setdefault(key, value)
        from vllm import LLM

        from segrl.rollout.vllm_weights import HANDED_OVER, register

        register()
        alone, place = "uni", policy.device.index or 0
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            alone = "external_launcher"  # one independent engine per rank
            os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
            os.environ.setdefault("LOCAL_RANK", str(place))
        if policy.device.type == "cuda" and place != int(os.environ.get("LOCAL_RANK", 0)):
            raise ValueError(
                f"trainer.devices: must be the first GPUs under rollout=vllm; the policy is on GPU {place} "
                "(choose GPUs by CUDA_VISIBLE_DEVICES)"
            )
        print("starting vLLM ...", file=sys.stderr, flush=True)
        threads = torch.get_num_threads()
        try:
            llm = LLM(
                policy.weights, dtype=str(policy.pass_dtype).removeprefix("torch."), enforce_eager=self.eager,
                max_model_len=wire.model_length(policy.most_positions, self.max_prefix, self.max_tokens),
                gpu_memory_utilization=self.memory, limit_mm_per_prompt={"image": 1}, enable_mm_embeds=True,
                distributed_executor_backend=alone, logprobs_mode="processed_logprobs", load_format="dummy",
                enable_sleep_mode=self.sleep and policy.device.type == "cuda", seed=0,
                weight_transfer_config={"backend": HANDED_OVER},
                **({} if policy.device.type == "cuda" else wire.WHOLE_PREFIXES),
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"rollout: vLLM must start; with rollout.memory={self.memory} it fails: {str(error)[:300]}"
            ) from error
        torch.set_num_threads(threads)  # vLLM has set another number for the whole process
        return llm


def _request(policy: ServedPolicy, prefix: Prefix) -> Any:  # noqa: ANN401 - vllm's own type
    """Return vLLM's input for one group: token ids, the image's features and their place."""
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    image = wire.picture(policy, prefix)
    place = PlaceholderRange(offset=image.first, length=image.length)
    items = MultiModalKwargsItems({"image": [image.item]})
    return mm_input(prefix.token_ids.tolist(), items, {"image": [image.name]}, {"image": [place]})


def _said(one: Any) -> wire.VLLMCompletion:  # noqa: ANN401 - vllm's own type
    """Return one completion from an output of vLLM."""
    logprobs = [place[token].logprob for token, place in zip(one.token_ids, one.logprobs, strict=True)]
    return wire.VLLMCompletion(list(one.token_ids), logprobs, one.finish_reason == "stop")
