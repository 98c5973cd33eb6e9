"""Count what the kernels of a GRPO step would take on a GPU, without one.

`python benchmarks/roofline.py` runs segrl's own code on tensors without contents, as `memory.py` does. It
gives every kernel its arithmetic or its bytes, whichever takes longer, at the speeds that `floor.py` has for
an H200, and prints one JSON line per part beside its floor. This is the time of a step if every kernel ran at
full speed and nothing lay between kernels: a lower bound, not a measurement. The case: 3B, all weights,
bfloat16 passes, 8 prompts of 768x768 pixels, 8 completions of 256 tokens.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import floor
import no_contents
import tiny_vlm
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

PROMPTS, GROUP, TOKENS, SIDE = 8, 8, 256, 768
H200 = floor.Speeds(operations=790e12, bytes=4.3e12, width=2)
_NOTHING = ("empty", "detach", "alias", "lift", "_unsafe_view", "_local_scalar")
_PART = ("index_select", "index.Tensor", "embedding.default", "gather")  # read no more than they write


@torch.library.custom_op("roofline::rms_norm", mutates_args=())
def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """Count a norm as one kernel, as on a GPU; a CPU makes six of it."""
    return torch.empty_like(hidden)


@torch.library.custom_op("roofline::rms_norm_backward", mutates_args=())
def _norm_backward(gradient: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


_norm.register_fake(lambda hidden, weight: torch.empty_like(hidden))
_norm_backward.register_fake(lambda _, hidden, weight: (torch.empty_like(hidden), torch.empty_like(weight)))
_norm.register_autograd(
    lambda ctx, gradient: _norm_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Roofline(TorchDispatchMode):
    """Counts seconds and kernels by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.kernels = Counter[str](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation without contents, and count it."""
        args, kwargs, name = no_contents.with_places(function, args), kwargs or {}, str(function)
        out = function(*args, **kwargs)
        if function.namespace == "prim" or function.is_view or any(word in name for word in _NOTHING):
            return out
        given, made = (
            [t for t in tree_iter(part) if isinstance(t, Tensor)] for part in ((args, kwargs), out)
        )
        moved = sum(map(_bytes, made)) + sum(
            map(_bytes, made if any(part in name for part in _PART) else given)
        )
        if "index_copy_" in name:
            moved = 2 * _bytes(given[-1])
        kind, arithmetic, rate = "the rest", 0.0, H200.operations
        if "attn" in name or "attention" in name:
            kind, arithmetic = "attention", _attention(name, given)
        elif function.overloadpacket in flop_registry:
            kind, arithmetic = (
                "products",
                flop_registry[function.overloadpacket](*args, **kwargs, out_val=out),
            )
            rate /= 1 if made[0].dtype == torch.bfloat16 else 2  # TF32
        elif "rms_norm" in name:
            kind = "norms"
        self.seconds[kind] += max(arithmetic / rate, moved / H200.bytes)
        self.kernels += 1
        return out


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, at most those of its storage, which an expanded view repeats."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _attention(name: str, given: list[Tensor]) -> float:
    """Return the operations of attention: every query with the keys of its segment, or half of them if
    causal.
    """
    backward = "backward" in name
    query, key, *_ = given[1:] if backward else given
    ends = [tensor for tensor in given if tensor.dtype == torch.int32]
    seen = len(key) / (len(ends[0]) - 1) if ends else key.shape[-2] / 2
    return 4 * query.numel() * seen * (2.5 if backward else 1)


def line(part: str, roof: Roofline, least: float, times: int = 1, **more: object) -> None:
    """Print a part, counted `times` times."""
    seconds = times * sum(roof.seconds.values())
    print(json.dumps({
        "part": part, **more, "ms": round(1000 * seconds, 1), "floor_ms": round(1000 * least, 1),
        "times_the_floor": round(seconds / least, 2),
        "of_it_ms": {kind: round(1000 * times * value, 1) for kind, value in roof.seconds.most_common()},
        "kernels": roof.kernels,
    }), flush=True)  # fmt: skip


def sampling(policy: Any, prefixes: list[Any], least: dict[str, float]) -> None:
    """Count the prefixes, and one token of every completion times the number of tokens."""
    from segrl.rollout.shared_prefix import sample_tokens

    rows, roof = PROMPTS * GROUP, Roofline()
    with no_contents.as_on_a_gpu(), torch.no_grad():
        with roof:
            state = policy.prefill(prefixes)
        line("read prefixes", roof, least["read prefixes"])
        decoder, head = policy.decoder(state, GROUP, TOKENS, stride=128), policy.head()
        decoder.place, roof = TOKENS // 2, Roofline()
        with roof:
            hidden = decoder.step(torch.zeros(rows, dtype=torch.long))
            sample_tokens(policy.logits(hidden, head).softmax(-1), torch.zeros(rows, dtype=torch.float64))
        line("sample", roof, least["sample"], TOKENS, tokens=TOKENS, kernels_are_of="a token")


def learning(folder: Path, least: dict[str, float], recomputed: bool) -> None:
    """Count a pass over all groups and its backward pass."""
    from segrl.types import Completions

    policy, roof = weights(folder, recomputed), Roofline()
    prefixes = no_contents.prefixes_of(policy, SIDE, PROMPTS)
    tokens = torch.full((PROMPTS * GROUP, TOKENS), 100)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completions = Completions(tokens=tokens, mask=mask, texts=[""] * len(tokens), finished=mask[:, 0])
    with no_contents.as_on_a_gpu(), roof:
        policy.logprobs(prefixes, completions).sum().backward()
    line("learn", roof, least["learn"], activations="computed again" if recomputed else "kept")


def weights(folder: Path, recomputed: bool) -> Any:
    """Return the 3B policy without contents."""
    settings = {"lora": None, "dtype": "float32", "train_vision": True, "gradient_checkpointing": recomputed}
    shape = no_contents.config(no_contents.SIZES["Qwen2.5-VL-3B"])
    return no_contents.emptied(no_contents.policy(folder, shape, settings))


def main() -> None:
    """Count all parts."""
    if sys.argv[1:]:
        sys.exit(__doc__)
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "policy", side=SIDE)
    policy = weights(folder, False)
    prefixes = no_contents.prefixes_of(policy, SIDE, PROMPTS)
    work = floor.Work(
        prompts=PROMPTS, group=GROUP, prefix=len(prefixes[0].token_ids), patches=len(prefixes[0].pixels),
        tokens=TOKENS, reference=False, kept=False,
    )  # fmt: skip
    least = floor.floor(no_contents.config(no_contents.SIZES["Qwen2.5-VL-3B"]), work, H200)
    with mock.patch.object(F, "rms_norm", lambda hidden, shape, weight, eps: _norm(hidden, weight)):
        sampling(policy, prefixes, least)
        del policy
        for recomputed in (False, True):
            learning(folder, least, recomputed)


if __name__ == "__main__":
    main()
