"""Attention of a vision tower: patches see their own window, or their own image, and no other.

transformers asks its attention once per window, hundreds of calls in a layer for a batch of images. Here a layer is one call of
torch's kernel for unequal lengths, in half precision on a GPU; elsewhere windows of one size are rows of one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from segrl.models.suffixes import has_kernel

NAME = "segrl_flash_windows"
"""By which transformers knows it; to a name with `flash` in it, it gives all windows at once."""


def window_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    cu_seq_lens_q: Tensor, max_length_q: int, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers' vision layers call it.

    Args:
        module: the layer's attention; not looked at.
        query: `[1, H, L, d]`, patches in the order of their windows.
        key: likewise.
        value: likewise.
        attention_mask: none.
        scaling: of the products.
        cu_seq_lens_q: int32 `[windows + 1]`, where each begins and where the last one ends.
        max_length_q: patches of the largest.

    Returns:
        `[1, L, H, d]`.
    """
    device = query.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query.dtype
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    ends, most = cu_seq_lens_q, max_length_q
    if has_kernel(device, dtype):
        out: Any = varlen_attn(q.to(dtype), k.to(dtype), v.to(dtype), ends, ends, most, most, scale=scaling)
        return out[None], None
    sizes, done, places = ends.diff(), list[Tensor](), list[Tensor]()
    for size in sizes.unique().tolist():
        here = (ends[:-1][sizes == size, None] + torch.arange(size, device=device)).flatten()
        one, two, three = (
            part.index_select(0, here).unflatten(0, (-1, size)).transpose(1, 2) for part in (q, k, v)
        )
        said = F.scaled_dot_product_attention(one, two, three, scale=scaling)
        done.append(said.transpose(1, 2).flatten(0, 1))
        places.append(here)
    return torch.cat(done).index_select(0, torch.cat(places).argsort())[None], None
