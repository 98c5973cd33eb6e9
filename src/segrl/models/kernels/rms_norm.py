"""Norms in front of products: a kernel and a cast, instead of six kernels and a cast for each product that reads it.

Under autocast the gradients of those products add up in half precision, and in a tower whose sums are in half precision weights are
rounded, too: the noise of half precision grows by a fifth. benchmarks/roofline.py counts the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# transformers' names, of trunk and tower
_IN_FRONT = {"input_layernorm", "post_attention_layernorm", "norm1", "norm2"}


class Norm(nn.Module):
    """Root-mean-square norm, in the precision of the passes.

    Args:
        norm: of transformers; its weight is shared.
    """

    def __init__(self, norm: Any) -> None:  # noqa: ANN401 - every family has a class of its own
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.eps: float = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`; float32 comes out as what autocast would make of it for the products."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            normed = F.rms_norm(hidden, hidden.shape[-1:], self.weight.to(hidden.dtype), self.eps)
        return normed.to(dtype)


def fuse_norms(model: nn.Module) -> None:
    """Put `Norm` in front of the products of every layer; weights keep their names."""
    for layer in list(model.modules()):
        for name, norm in list(layer.named_children()):
            if name in _IN_FRONT and type(norm).__name__.endswith("RMSNorm"):  # Qwen3's tower has others
                setattr(layer, name, Norm(norm))
