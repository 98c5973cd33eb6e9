"""Policies of real size on tensors that have shapes and no contents (torch's FakeTensor).

`memory.py` and `roofline.py` run them without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_vlm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
INSTRUCTION = 280  # tokens beside the image's, as Seg-R1's
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten._index_put_impl_.default,
    torch.ops.aten.index_put.default,
}


def config(size: dict[str, Any]) -> Any:
    """Return the configuration as transformers has it."""
    from transformers import Qwen2_5_VLConfig

    text = {
        **size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    tower = {**VISION, "out_hidden_size": size["hidden_size"]}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=size["tie_word_embeddings"]
    )


def with_places(function: Any, args: Any) -> Any:
    """Return the arguments of an operation, with an index by a mask replaced by an index by positions.

    Shapes must not depend on contents, and the shape of an index by a mask does.
    """
    if function not in _INDEXED:
        return args
    places = [
        i
        for at in args[1]
        for i in (at.nonzero(as_tuple=True) if at is not None and at.dtype == torch.bool else (at,))
    ]
    return (args[0], places, *args[2:])


def emptied(module: Any) -> Any:
    """Replace parameters and buffers on `meta` by CPU tensors without contents; shared ones stay shared."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Any]()
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None and value.is_meta and id(value) not in made:
                    with mode:
                        empty = torch.empty_strided(
                            value.shape, value.stride(), dtype=value.dtype, device="cpu"
                        )
                    made[id(value)] = (
                        nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
                    )
                if value is not None and value.is_meta:
                    held[name] = made[id(value)]
    return module


def policy(folder: Path, shape: Any, settings: dict[str, Any]) -> Any:
    """Return a policy on `meta`.

    It has the processor in `folder`, weights of the configuration `shape`, and `settings` of its constructor.
    """
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        GenerationConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    from segrl.models.hf_vlm import HFPolicy

    own = AutoConfig.from_pretrained(folder)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(shape, name, getattr(own, name))

    def build(*_: object, dtype: torch.dtype, attn_implementation: str, **__: object) -> Any:
        shape._attn_implementation = attn_implementation
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(shape).to(dtype)
        model.generation_config = GenerationConfig(eos_token_id=own.text_config.eos_token_id)
        return model, dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), ())

    with mock.patch.object(AutoModelForImageTextToText, "from_pretrained", build):
        return HFPolicy(str(folder), None, None, 1.0, **settings)


@contextmanager
def as_on_a_gpu(kernel: bool = True) -> Iterator[None]:
    """Run the passes as on a GPU.

    They are bfloat16 without a cache of casts, as Lightning has them, with the layouts and the kernel of a
    GPU; the kernel computes nothing here.
    """
    from segrl.models.kernels import decoder
    from segrl.models.kernels import onednn_linear
    from segrl.models.kernels import prefix_pass
    from segrl.models.kernels import suffix_attention
    from segrl.models.kernels import token_logprobs
    from segrl.models.kernels import vision_tower
    from segrl.models.kernels import window_attention

    def plain(self: Any, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias, self.packed = weight, bias, None

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(suffix_attention, "has_kernel", lambda *_: kernel))
        for module in (window_attention, vision_tower):
            stack.enter_context(mock.patch.object(module, "kernel_serves", lambda *_: kernel))
        stack.enter_context(mock.patch.object(prefix_pass, "padded_to", lambda *_: 32))
        chunk = token_logprobs.chunk_on(torch.device("cuda"))
        stack.enter_context(mock.patch.object(token_logprobs, "chunk_on", lambda _: chunk))
        stack.enter_context(mock.patch.object(decoder.PackedLinear, "__init__", plain))
        stack.enter_context(mock.patch.object(onednn_linear, "_by_onednn", lambda *_: False))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
        yield


def prefixes_of(policy: Any, side: int, count: int) -> list[Any]:
    """Return prefixes of a noise image and an instruction of Seg-R1's length."""
    content = [{"type": "image"}, {"type": "text", "text": "x" * INSTRUCTION}]
    return [
        policy.encoder.encode([{"role": "user", "content": content}], tiny_vlm.image(i, side))
        for i in range(count)
    ]
