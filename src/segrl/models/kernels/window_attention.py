"""Attention of a vision tower: patches see their own window, or their own image, and no other.

transformers asks its attention once per window, hundreds of calls in a layer for a batch of images. Here a layer is one call of
torch's kernel for unequal lengths, in half precision on a GPU; elsewhere windows of one size are rows of one call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from segrl.models.kernels.first_use import learning_apart, repeats
from segrl.models.kernels.suffix_attention import CLOSE, by_flash, has_kernel

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
    if kernel_serves(device, dtype):
        parts = q.to(dtype), k.to(dtype), v.to(dtype)
        return _by_kernel(*parts, cu_seq_lens_q, max_length_q, scaling)[None], None
    return _by_size(q, k, v, cu_seq_lens_q, scaling)[None], None


def kernel_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether one call of torch's kernel serves windows there.

    To be asked before a pass begins: the first answer takes a pass of its own, which a checkpoint must not record.
    """
    return has_kernel(device, dtype) and _kernel_repeats(device, dtype)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float
) -> Tensor:
    """Attend in one call of torch's kernel, `[L, H, d]`."""
    with by_flash():
        out: Any = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)
    attended: Tensor = out
    return attended


def _by_size(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scaling: float) -> Tensor:
    """Attend in one call per size of window, `[L, H, d]`."""
    windows = _windows_of(ends)
    done = []
    for places, size in windows.by_size:
        q, k, v = (part[places].unflatten(0, (-1, size)).transpose(1, 2) for part in (query, key, value))
        said = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        done.append(said.transpose(1, 2).flatten(0, 1))
    return torch.cat(done)[windows.back]


class _Windows:
    """Patches by the size of their window, and the way back to their order."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ref(ends)
        sizes = ends.diff()
        self.by_size: list[tuple[Tensor, int]] = []
        for size in sizes.unique().tolist():
            within = torch.arange(size, device=ends.device)
            self.by_size.append(((ends[:-1][sizes == size, None] + within).flatten(), size))
        self.back = torch.cat([places for places, _ in self.by_size]).argsort()


_latest: deque[_Windows] = deque(maxlen=2)
"""A tower's layers take turns with two layouts, windows and whole images, and each is worked out once per pass."""


def _windows_of(ends: Tensor) -> _Windows:
    found = next((windows for windows in _latest if windows.ends() is ends), None)
    if found is None:
        found = _Windows(ends)
        _latest.append(found)
    return found


@cache
def _kernel_repeats(device: torch.device, dtype: torch.dtype) -> bool:
    """Hold the kernel against calls by size, values and gradients, once in a process, at the widths of Qwen's towers."""
    with learning_apart(device):
        return all(_repeats_at(width, device, dtype) for width in (64, 72, 80))


def _repeats_at(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Hold it against calls by size at one head width."""
    ends = torch.tensor([0, 64, 128, 160, 176], dtype=torch.int32, device=device)

    def outcome(attend: Callable[..., Tensor], *longest: int) -> list[Tensor]:
        """Return the output and the gradients, of the same noise each time."""
        noise = torch.Generator(device).manual_seed(width)
        qkv = torch.randn(176, 3, 4, width, device=device, dtype=dtype, generator=noise).requires_grad_()
        out = attend(*qkv.unbind(1), ends, *longest, width**-0.5)
        return [out, *torch.autograd.grad(out.float().square().sum(), [qkv])]

    return repeats(
        f"the vision tower's windows on {device}: one call per size, not one of torch's kernel",
        lambda: outcome(_by_kernel, 64),
        lambda: outcome(_by_size),
        CLOSE,
    )
