"""Compute the RMSNorm in front of linear layers in one fused kernel, with its output in the autocast dtype.

transformers uses six kernels, and each layer that reads the float32 output casts it. benchmarks/roofline.py
counts the kernels.

The price is a fifth more noise in half-precision gradients: under autocast the gradients of the layers that
read one output are summed in half precision. In a tower whose residual sums are in half precision, the norm's
weight is rounded, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# transformers' names, in the language model and in the vision tower
_IN_FRONT = {"input_layernorm", "post_attention_layernorm", "norm1", "norm2"}


class Norm(nn.Module):
    """Root-mean-square norm whose output has the autocast dtype.

    Args:
        norm: transformers' layer that it replaces; its weight is shared.
    """

    def __init__(self, norm: Any) -> None:  # noqa: ANN401 - every family has a class of its own
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.eps: float = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normed `[..., D]`, in the autocast dtype if autocast is on, else in its own dtype."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            normed = F.rms_norm(hidden, hidden.shape[-1:], self.weight.to(hidden.dtype), self.eps)
        return normed.to(dtype)


def fuse_norms(model: nn.Module) -> None:
    """Replace the RMSNorms in front of linear layers by `Norm`; names of parameters do not change."""
    for layer in list(model.modules()):
        for name, norm in list(layer.named_children()):
            # Qwen3-VL's tower has LayerNorms of the same names, which stay.
            if name in _IN_FRONT and type(norm).__name__.endswith("RMSNorm"):
                setattr(layer, name, Norm(norm))
