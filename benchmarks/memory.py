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
from torch._subclasses.fake_tensor import FakeTensorMode
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
INSTRUCTION, GROUP, COMPLETION = (
    280,
    8,
    400,
)  # Seg-R1's tokens beside the image's 729; --max_completion_length
LORA = {"rank": 64, "alpha": 64, "dropout": 0.0}
CONTEXT = 1.0e9  # CUDA's own
BUCKET, GATHERED = (
    5e8 * 4,
    1e9 * 4,
)  # DeepSpeed's reduce_bucket_size and stage3_max_live_parameters, in float32
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten._index_put_impl_.default,
    torch.ops.aten.index_put.default,
}


def config(size: dict[str, Any]) -> Any:
    """As transformers has it."""
    from transformers import Qwen2_5_VLConfig

    text = {
        **size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    tower = {**VISION, "out_hidden_size": size["hidden_size"]}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=size["tie_word_embeddings"]
    )


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = dict[int, int]()
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
            places = [
                i
                for at in given
                for i in (at.nonzero(as_tuple=True) if at is not None and at.dtype == torch.bool else (at,))
            ]
            args = (args[0], places, *args[2:])
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return out


def emptied(module: Any) -> Any:
    """The module, its parameters and buffers on `meta` become tensors of a CPU without contents; what is shared stays shared."""
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


def policy(folder: Path, shape: Any, lora: dict[str, Any] | None, recompute: bool) -> Any:
    """A policy on `meta`: the processor in `folder`, a model of the configuration `shape`; weights are float32 where they learn."""
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
        return model

    with mock.patch.object(AutoModelForImageTextToText, "from_pretrained", build):
        return HFPolicy(
            str(folder),
            None,
            None,
            1.0,
            "bfloat16" if lora else "float32",
            "sdpa",
            lora,
            lora is None,
            recompute,
        )


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


def held(module: nn.Module) -> Ledger:
    """A ledger that begins with what a module holds."""
    ledger = Ledger()
    for tensor in (*module.parameters(), *module.buffers()):
        ledger.note(tensor)
    return ledger


def prompt(policy: Any, side: int) -> Any:
    """A prefix."""
    content = [{"type": "image"}, {"type": "text", "text": "x" * INSTRUCTION}]
    return policy.encoder.encode([{"role": "user", "content": content}], tiny_vlm.image(0, side))


def sampling(ledger: Ledger, policy: Any, prefix: Any) -> int:
    """Most bytes while a group is sampled, beyond those that stay."""
    before = ledger.peak = ledger.now
    with ledger, as_on_a_gpu(), torch.no_grad():
        state = policy.prefill([prefix])
        decoder, head = policy.decoder(state, GROUP, COMPLETION, stride=128), policy.head()
        decoder.place = COMPLETION - 1
        hidden = decoder.step(torch.zeros(GROUP, dtype=torch.long))
        policy.logits(hidden, head).softmax(-1).cumsum(-1, dtype=torch.float64)
    return ledger.peak - before


def learning(ledger: Ledger, policy: Any, prefix: Any, shared_out: bool) -> int:
    """Most bytes in an update, beyond the weights: activations, gradients and AdamW's moments; what is shared out over ranks is not in it."""
    from segrl.types import Completions

    learns = [p for p in policy.parameters() if p.requires_grad]
    tokens = torch.full((GROUP, COMPLETION), 100)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completions = Completions(tokens=tokens, mask=mask, texts=[""] * GROUP, finished=mask[:, 0])
    before, optimizer = ledger.now, torch.optim.AdamW(learns, foreach=True)
    if shared_out:  # a gradient goes as soon as it is whole
        for parameter in learns:
            parameter.register_post_accumulate_grad_hook(lambda whole: setattr(whole, "grad", None))
    for _ in range(1 if shared_out else 2):  # the first update leaves the moments
        optimizer.zero_grad()
        ledger.peak = ledger.now
        with ledger:
            policy.logprobs([prefix], completions).sum().backward()
            if not shared_out:
                optimizer.step()
    return ledger.peak - before


def check(folder: Path) -> None:
    """One JSON line: most bytes in an update of the tiny policy, with contents and without; they have to be equal."""
    from transformers import AutoConfig

    from segrl.models.hf_vlm import HFPolicy

    peaks = {}
    for lora in (None, LORA):
        real = HFPolicy(
            str(folder), None, None, 1.0, "bfloat16" if lora else "float32", "sdpa", lora, lora is None, False
        )
        for name, model in {
            "with": real,
            "without": emptied(policy(folder, AutoConfig.from_pretrained(folder), lora, False)),
        }.items():
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                peaks[name] = learning(held(model), model, prompt(model, tiny_vlm.SIDE), False)
        print(
            json.dumps({"lora": lora is not None, "contents": peaks["with"], "no_contents": peaks["without"]})
        )
        if peaks["with"] != peaks["without"]:
            sys.exit(1)


def mask_head() -> tuple[int, int]:
    """Bytes of SAM 2.1 Large in float32 with the embeddings of 64 images, and of one image in its encoder."""
    from segrl.models.sam2_head import _build

    model = emptied(_build("configs/sam2.1/sam2.1_hiera_l.yaml").eval().to("meta"))
    ledger = held(model)
    weights = ledger.now
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, torch.no_grad():
        out = model.forward_image(torch.zeros(1, 3, 1024, 1024))
    return weights + 64 * sum(
        level.untyped_storage().nbytes() for level in out["backbone_fpn"]
    ), ledger.peak - weights


def reference(folder: Path, size: dict[str, Any]) -> int:
    """Bytes of a frozen copy of weights that learn."""
    from segrl.models.reference import FrozenCopy

    frozen = FrozenCopy.__new__(FrozenCopy)
    nn.Module.__init__(frozen)
    frozen.policy = policy(folder, config(size), None, False)
    frozen.made_for(torch.bfloat16)
    return held(frozen).now


def case(
    folder: Path,
    name: str,
    lora: dict[str, Any] | None,
    zero: int | None,
    recompute: bool,
    frozen: bool,
    head: tuple[int, int],
) -> None:
    """One JSON line: a prompt and its group in one pass, on one GPU or on eight that share out."""
    size = SIZES[name]
    model = emptied(policy(folder, config(size), lora, recompute))
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prefix, ledger = prompt(model, 768), held(model)
    weights = ledger.now
    always = {"SAM 2": head[0], "context": CONTEXT, "reference": reference(folder, size) if frozen else 0}
    if (
        zero
    ):  # of each rank its share of gradients, main weights and two moments; one GPU has them in `learning`
        always |= {"shares of 8": numbers * 16 / 8, "bucket": BUCKET}
    sampled = weights + sampling(ledger, model, prefix) + head[1]
    with as_on_a_gpu():
        learned = learning(ledger, model, prefix, shared_out=zero is not None)
    learned += GATHERED if zero == 3 else weights
    gb = {
        key: round(value / 1e9, 2)
        for key, value in {"weights": weights, **always, "sampling": sampled, "learning": learned}.items()
    }
    stays = sum(always.values())
    print(json.dumps({
        "policy": name, "lora": lora and lora["rank"], "zero": zero, "gradient_checkpointing": recompute, "frozen_copy": frozen,
        "prefix": len(prefix.token_ids), "group": GROUP, "completion": COMPLETION, "gb": gb,
        "while_sampling_gb": round((stays + sampled) / 1e9, 1), "while_learning_gb": round((stays + learned) / 1e9, 1),
    }), flush=True)  # fmt: skip


def main() -> None:
    """The cases that the documents speak of."""
    logging.disable()
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "policy", side=768)
    if sys.argv[1:] == ["--check"]:
        return check(folder)
    small, large, head = *SIZES, mask_head()
    for recompute in (True, False):
        case(folder, small, LORA, None, recompute, False, head)
    for recompute in (True, False):
        for frozen in (True, False):
            case(folder, small, None, 2, recompute, frozen, head)
    case(folder, large, LORA, None, True, False, head)
    for zero in (2, 3):
        case(folder, large, None, zero, True, False, head)
    return None


if __name__ == "__main__":
    main()
