"""The patch embedding as one product, beside the convolution that it replaces: CPU seconds, one thread.

`python benchmarks/patches.py` prints one JSON line per case: forward and backward pass of the nano tower over
16 images in float32, and of a patch embedding of 1,024 patches of 16 pixels in bfloat16. The figures are
medians of rounds, the two sides in turn. The script exits with 1 where a bar is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import tiny_vlm
import torch
from torch import nn

from segrl.runs.configuration import asset
from segrl.models.hf_vlm import HFPolicy
from segrl.models.kernels.onednn_linear import Patches
from segrl.models.kernels.vision_tower import image_features

BARS = {"nano tower, float32": 1.4, "patch embedding, bfloat16": 100.0}


def seconds(work: Callable[[], torch.Tensor]) -> float:
    """Return the CPU seconds of a forward and a backward pass."""
    began = time.process_time()
    work().float().square().sum().backward()
    return time.process_time() - began


def compare(
    name: str, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], rounds: int
) -> bool:
    """Print both sides and their ratio; return whether the bar is met."""
    taken: dict[str, list[float]] = {"product": [], "convolution": []}
    for _ in range(rounds + 1):
        taken["product"].append(seconds(ours))
        taken["convolution"].append(seconds(theirs))
    medians = {side: statistics.median(values[1:]) for side, values in taken.items()}
    ratio = medians["convolution"] / medians["product"]
    rounded = {side: round(value, 4) for side, value in medians.items()}
    passed = ratio >= BARS[name]
    print(
        json.dumps(
            {
                "case": name,
                "cpu_seconds": rounded,
                "ratio": round(ratio, 2),
                "bar": BARS[name],
                "passed": passed,
            }
        )
    )
    return passed


def main() -> int:
    """Measure both cases."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False)
    embedding = policy.model.model.visual.patch_embed
    product = embedding.proj
    convolution = nn.Conv3d(
        product.in_channels,
        product.out_channels,
        product.kernel_size,
        product.stride,
        bias=product.bias is not None,
    )
    convolution.load_state_dict(product.state_dict())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    prefixes = [policy.encoder.encode(chat, tiny_vlm.image(i, 128)) for i in range(16)]

    def tower(layer: nn.Module) -> torch.Tensor:
        embedding.proj = layer
        return torch.cat(image_features(policy.model.model, prefixes).pooler_output)

    whole = compare("nano tower, float32", lambda: tower(product), lambda: tower(convolution), 7)
    half = nn.Conv3d(3, 1280, (2, 16, 16), (2, 16, 16)).bfloat16()
    shared, patches = Patches(half), torch.randn(1024, 3, 2, 16, 16, dtype=torch.bfloat16)
    alone = compare("patch embedding, bfloat16", lambda: shared(patches), lambda: half(patches), 1)
    return 0 if whole and alone else 1


if __name__ == "__main__":
    sys.exit(main())
