"""Compute the least time that a GRPO step can take from the arithmetic and the bytes of its parts.

`python benchmarks/floor.py` prints one JSON line per case: the papers' policies on an H200. Its speeds (790
TFLOP/s in bfloat16, 4.3 TB/s) were measured on such a GPU by a large product and a large copy; the script
itself measures nothing. `speeds()` measures the machine it runs on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import no_contents


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step: B prompts of P tokens, each with an image of so many patches and G completions of T tokens."""

    prompts: int
    group: int
    prefix: int
    patches: int
    tokens: int
    reference: bool
    kept: bool
    """Whether the prefix is read once for sampling and learning."""


def of_noise(work: Any, kept: bool) -> Work:
    """Return the work of a step of `noise.py`.

    If `kept`, the prefix is read once, for sampling and for learning.
    """
    return Work(
        prompts=work.prompts, group=work.group, prefix=work.prefix, patches=work.patches, tokens=work.tokens,
        reference=work.beta > 0, kept=kept,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Speeds of a machine.

    Operations per second in the precision of the passes, bytes per second, and bytes of one number in a pass.
    """

    operations: float
    bytes: float
    width: int


def floor(config: Any, work: Work, machine: Speeds) -> dict[str, float]:
    """Return the seconds of each part of a step, and of the whole step.

    A part takes as long as its arithmetic or its bytes take, whichever is longer.
    """
    numbers, text, vision = _numbers(config), config.text_config, config.vision_config
    layers, wide = text.num_hidden_layers, text.hidden_size
    remembered = (
        2 * layers * wide // text.num_attention_heads * text.num_key_value_heads * machine.width
    )  # bytes per token
    b, g, p, t = work.prompts, work.group, work.prefix, work.tokens

    def read(new: float, before: float) -> float:
        return 2 * numbers["layers"] * new + 4 * layers * wide * new * (before + new / 2)

    full = len(vision.fullatt_block_indexes)
    window = (vision.window_size // vision.patch_size) ** 2
    looked_at = full * work.patches + (vision.depth - full) * min(window, work.patches)
    tower = (
        2 * (numbers["tower"] + numbers["merger"] / vision.spatial_merge_size**2) * work.patches
        + 4 * vision.hidden_size * work.patches * looked_at
    )
    prefixes = b * (tower + read(p, 0))
    completions = b * g * (read(t, p) + 2 * numbers["head"] * t)
    weights = (numbers["layers"] + numbers["head"]) * machine.width

    def least(operations: float, moved: float) -> float:
        return max(operations / machine.operations, moved / machine.bytes)

    parts = {
        "read prefixes": least(prefixes, weights),
        "sample": least(completions, t * (weights + b * (p + g * t / 2) * remembered)),
        "learn": least((2 if work.kept else 3) * prefixes + 3 * completions, 3 * weights),
        "reference": least(prefixes + completions, weights) if work.reference else 0.0,
        "AdamW": 28
        * numbers["all"]
        / machine.bytes,  # reads weight, gradient and two moments, writes all but the gradient
    }
    return {**parts, "step": sum(parts.values())}


def _numbers(config: Any) -> dict[str, float]:
    """Count the parameters by what they work on, without allocating them."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)

    def count(module: Any) -> int:
        return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())

    visual, language = model.model.visual, model.model.language_model
    merger = count(visual.merger)
    return {
        "all": count(model), "head": model.lm_head.weight.numel(), "layers": count(language.layers),
        "merger": merger, "tower": count(visual) - merger,
    }  # fmt: skip


def speeds(device: str) -> Speeds:
    """Measure this machine with a large product and a large copy (which reads and writes); the best of
    several runs.
    """
    import torch

    from segrl.models.kernels.onednn_linear import rows_by_rows  # on a CPU the fastest library at hand

    gpu = device == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    moved, target = (torch.ones(2**28 if gpu else 2**25, device=device) for _ in range(2))

    def best(work: Any) -> float:
        taken = []
        for _ in range(10):
            began = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        return min(taken)

    product, copy = best(lambda: rows_by_rows(one, other)), best(lambda: target.copy_(moved))
    return Speeds(operations=2 * side**3 / product, bytes=2 * moved.nbytes / copy, width=one.element_size())


def main() -> None:
    """Print the floor of a step of the papers' policies on an H200."""
    machine = Speeds(operations=790e12, bytes=4.3e12, width=2)
    for name, size in no_contents.SIZES.items():
        for prompts in (1, 8):
            for reference in (False, True):
                work = Work(
                    prompts=prompts,
                    group=8,
                    prefix=1029,
                    patches=54 * 54,
                    tokens=256,
                    reference=reference,
                    kept=False,
                )
                parts = floor(no_contents.config(size), work, machine)
                print(json.dumps({
                    "model": name, "prompts": prompts, "group": 8, "tokens": 256, "image": "756x756",
                    "reference": reference, "gpu": "H200",
                    "floor_ms": {part: round(1000 * value, 1) for part, value in parts.items()},
                }))  # fmt: skip


if __name__ == "__main__":
    main()
