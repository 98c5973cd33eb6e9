"""What a GPU has to hold: sampling and one update of policies of real size, gone through without contents.

`python benchmarks/memory.py` prints one JSON line per case, in GB (1e9 bytes): images of 768x768, 8 completions of 400 tokens, bfloat16
passes. The product's own code runs on tensors that have shapes and no contents (torch's FakeTensor), forward, backward and AdamW, and the
bytes of every tensor are counted as it comes and goes: no GPU is needed, and nothing is computed. Counted by hand are only CUDA's own
gigabyte, and what ZeRO shares out. Fragments of the allocator and working memory of libraries are not in it. `--check` goes through one
update of a tiny policy twice, with contents and without: the peaks are the same.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_vlm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
INSTRUCTION, GROUP, COMPLETION = 280, 8, 400  # Seg-R1's tokens beside the image's 729; --max_completion_length
LORA = {"rank": 64, "alpha": 64, "dropout": 0.0}
CONTEXT = 1.0e9  # CUDA's own
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten._index_put_impl_.default, torch.ops.aten.index_put.default}


def config(size: dict[str, Any]) -> Any:
    """As transformers has it."""
    from transformers import Qwen2_5_VLConfig

    text = {**size, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    tower = {**VISION, "out_hidden_size": size["hidden_size"]}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=size["tie_word_embeddings"]
    )


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that live, and the most there were: of those without contents, or of all."""

    def __init__(self, kind: type[Tensor] = FakeTensor) -> None:
        super().__init__()
        self.kind, self.live = kind, dict[int, int]()
        self.now = self.peak = 0

    def note(self, tensor: Tensor) -> None:
        """Count its storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """Its storage is gone."""
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and count what comes out."""
        if function in _INDEXED:  # shapes may not hang on contents, and masks have theirs
            given = args[1]
            places = [i for at in given for i in (at.nonzero(as_tuple=True) if at is not None and at.dtype == torch.bool else (at,))]
            args = (args[0], places, *args[2:])
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, self.kind):
                self.note(tensor)
        return out


def emptied(module: nn.Module) -> None:
    """Parameters and buffers on `meta` become tensors of a CPU without contents; what is shared stays shared."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Any]()
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None and value.is_meta and id(value) not in made:
                    with mode:
                        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
                    made[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
                if value is not None and value.is_meta:
                    held[name] = made[id(value)]


def policy(folder: Path, size: dict[str, Any], lora: dict[str, Any] | None, recompute: bool) -> Any:
    """A policy without contents, with the processor in `folder`."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, Qwen2_5_VLForConditionalGeneration

    from segrl.models.hf_vlm import HFPolicy

    def build(*_: object, dtype: torch.dtype, attn_implementation: str, **__: object) -> Any:
        real, own = config(size), AutoConfig.from_pretrained(folder)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            setattr(real, name, getattr(own, name))
        real._attn_implementation = attn_implementation
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(real).to(dtype)
        model.generation_config = GenerationConfig(eos_token_id=own.text_config.eos_token_id)
        return model

    with mock.patch.object(AutoModelForImageTextToText, "from_pretrained", build):
        made = HFPolicy(str(folder), 768, None, 1.0, "bfloat16" if lora else "float32", "sdpa", lora, lora is None, recompute)
    emptied(made)
    return made


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Bfloat16 passes without a cache of casts, as Lightning has them; layouts as on a GPU."""
    from segrl.models import decoder, shared_prefix, suffixes

    def plain(self: Any, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias, self.packed = weight, bias, None

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(shared_prefix, "laid_out", suffixes.Segments))
        stack.enter_context(mock.patch.object(decoder.Product, "__init__", plain))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
        yield


def prompt(policy: Any, side: int) -> Any:
    """A prefix."""
    content = [{"type": "image"}, {"type": "text", "text": "x" * INSTRUCTION}]
    return policy.encoder.encode([{"role": "user", "content": content}], tiny_vlm.image(0, side))


def sampling(ledger: Ledger, policy: Any, prefix: Any) -> float:
    """Most bytes while a group is sampled, beyond those that stay."""
    before = ledger.peak = ledger.now
    with ledger, as_on_a_gpu(), torch.no_grad():
        state = policy.prefill([prefix])
        decoder, head = policy.decoder(state, GROUP, COMPLETION, stride=128), policy.head()
        decoder.place = COMPLETION - 1
        hidden = decoder.step(torch.zeros(GROUP, dtype=torch.long))
        policy.logits(hidden, head).softmax(-1).cumsum(-1, dtype=torch.float64)
    return ledger.peak - before


def learning(ledger: Ledger, policy: Any, prefix: Any, shared_out: bool) -> float:
    """Most bytes while a group is learned from, beyond those that stay; a gradient that is shared out is gone when it is done."""
    from segrl.types import Completions

    def gone(parameter: Tensor) -> None:
        parameter.grad = None

    learns = [p for p in policy.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(gone) for p in learns if shared_out]
    tokens = torch.full((GROUP, COMPLETION), 100)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completions = Completions(tokens=tokens, mask=mask, texts=[""] * GROUP, finished=mask[:, 0])
    before = ledger.peak = ledger.now
    with ledger, as_on_a_gpu():
        policy.logprobs([prefix], completions).sum().backward()
    if not shared_out:
        with ledger:
            torch.optim.AdamW(learns, foreach=True).step()
    for handle in handles:
        handle.remove()
    for parameter in learns:
        parameter.grad = None
    return ledger.peak - before


def mask_head() -> tuple[float, float]:
    """Bytes of SAM 2.1 Large in float32 with the embeddings of 64 images, and of one image in its encoder."""
    from segrl.models.sam2_head import _build

    model = _build("configs/sam2.1/sam2.1_hiera_l.yaml").eval().to("meta")
    emptied(model)
    ledger = Ledger()
    for weight in model.parameters():
        ledger.note(weight)
    before = ledger.now
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, torch.no_grad():
        out = model.forward_image(torch.zeros(1, 3, 1024, 1024))
    embeddings = sum(level.untyped_storage().nbytes() for level in out["backbone_fpn"])
    return before + 64 * embeddings, ledger.peak - before


def check(folder: Path) -> None:
    """One update of a tiny policy, with contents and without."""
    raise NotImplementedError


if __name__ == "__main__":
    import time
    logging.disable()
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "p", side=768)
    print(mask_head())
    for size in SIZES.values():
      for lora, rec in ((LORA, True), (LORA, False), (None, False), (None, True)):
        t = time.time()
        p = policy(folder, size, lora, rec); ledger = Ledger()
        for w in [*p.parameters(), *p.buffers()]:
            if isinstance(w, FakeTensor): ledger.note(w)
        pre = prompt(p, 768)
        print(lora, rec, ledger.now/1e9, sampling(ledger, p, pre)/1e9, learning(ledger, p, pre, lora is None)/1e9, len(pre.token_ids), time.time()-t, flush=True)
