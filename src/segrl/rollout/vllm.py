"""Sampling by vLLM in this process: one engine per rank, beside the policy on its device.

policy -- weights, an adapter merged, whenever they have moved --> vLLM's own copy    (vllm_weights.py)
prefix -- one request for a group, whose cached prefix it shares --> n completions    (vllm_wire.py)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from segrl.models.hf_vlm import HFPolicy
from segrl.rollout import vllm_wire as wire
from segrl.types import Completions, Prefix

_HERE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are handed over, not sent
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns at every transfer of layers that have no weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's, too
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class VLLMEngine(wire.Engine):
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
        wire.needs_vllm("vllm")
        self.max_tokens, self.max_prefix = max_tokens, max_prefix
        self.memory, self.sleep, self.eager = memory, sleep, eager
        self.llm: Any = None
        self.numbers = count()
        self.pushed: int | None = None

    @torch.no_grad()
    def _generate(
        self, policy: HFPolicy, prefixes: Sequence[Prefix], group_size: int, temperature: float, seeds: Sequence[int]
    ) -> Completions:  # fmt: skip
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wire.check_lengths(prefixes, self.max_prefix)
        self._wake(policy)
        for prefix, seed in zip(prefixes, seeds, strict=True):
            asked = SamplingParams(
                **wire.settings(policy, group_size, temperature, seed, self.max_tokens),
                output_kind=RequestOutputKind.FINAL_ONLY,  # a group comes back whole
            )
            number = str(next(self.numbers))  # answers are sorted by it
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
    def _wake(self, policy: HFPolicy) -> None:
        """The engine, with the policy's weights of this moment.

        Evaluation may be the first to ask, and what is made in inference mode could not be changed later.
        """
        if self.llm is None:
            self.llm = self._start(policy)
        asleep = self.sleep and policy.device.type == "cuda" and self.pushed is not None
        if asleep:
            self.llm.wake_up(tags=["weights"])
        if asleep or policy.weights_version != self.pushed:  # sleep of level 2 forgets the weights
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"weights": policy.merged()}})
            self.llm.finish_weight_update()
            self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()
            self.pushed = policy.weights_version
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])

    def _start(self, policy: HFPolicy) -> Any:  # noqa: ANN401 - vllm's own class
        for key, value in _HERE.items():
            os.environ.setdefault(key, value)
        from vllm import LLM

        from segrl.rollout.vllm_weights import HANDED_OVER, register

        register()
        alone, place = "uni", policy.device.index or 0
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            alone = "external_launcher"  # an engine per rank, none of which knows the others
            os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
            os.environ.setdefault("LOCAL_RANK", str(place))
        if policy.device.type == "cuda" and place != int(os.environ.get("LOCAL_RANK", 0)):
            raise ValueError(
                f"trainer.devices: rollout=vllm takes the first GPUs; choose others by CUDA_VISIBLE_DEVICES; the policy is on GPU {place}"
            )
        print("starting vLLM ...", file=sys.stderr, flush=True)
        threads = torch.get_num_threads()
        try:
            llm = LLM(
                policy.weights, dtype=str(policy.pass_dtype).removeprefix("torch."), enforce_eager=self.eager,
                max_model_len=wire.model_length(policy.model.config, self.max_prefix, self.max_tokens), gpu_memory_utilization=self.memory, limit_mm_per_prompt={"image": 1},
                enable_mm_embeds=True, distributed_executor_backend=alone, logprobs_mode="processed_logprobs", load_format="dummy",
                enable_sleep_mode=self.sleep and policy.device.type == "cuda", seed=0, weight_transfer_config={"backend": HANDED_OVER},
                **({} if policy.device.type == "cuda" else wire.WHOLE_PREFIXES),
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"rollout: vLLM does not start (rollout.memory={self.memory}): {str(error)[:300]}"
            ) from error
        torch.set_num_threads(threads)  # vLLM sets its own, for the whole process
        return llm


def _request(policy: HFPolicy, prefix: Prefix) -> Any:  # noqa: ANN401 - vllm's own type
    """Token ids as they are, and where the image's features go."""
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    image = wire.picture(policy, prefix)
    place = PlaceholderRange(offset=image.first, length=image.length)
    items = MultiModalKwargsItems({"image": [image.item]})
    return mm_input(prefix.token_ids.tolist(), items, {"image": [image.name]}, {"image": [place]})


def _said(one: Any) -> wire.Said:  # noqa: ANN401 - vllm's own type
    """One completion of a request."""
    logprobs = [place[token].logprob for token, place in zip(one.token_ids, one.logprobs, strict=True)]
    return wire.Said(list(one.token_ids), logprobs, one.finish_reason == "stop")
