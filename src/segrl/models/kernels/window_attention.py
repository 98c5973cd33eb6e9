"""Compute the attention of a vision tower, in which a patch attends to its own window or its own image only.

transformers calls its attention once per window: hundreds of calls per layer for a batch of images. Here each
layer makes one call of torch's variable-length kernel in half precision on a GPU, and one call per size of
window elsewhere.
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
"""Name in transformers' attention interface; `flash` in it makes transformers pass all windows at once."""


def window_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    cu_seq_lens_q: Tensor, max_length_q: int, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return the attention of each window, with the signature that transformers' vision layers call.

    Args:
        module: the layer's attention; not used.
        query: `[1, H, L, d]`, patches in the order of their windows.
        key: likewise.
        value: likewise.
        attention_mask: None; not used.
        scaling: factor of the scores.
        cu_seq_lens_q: int32 `[windows + 1]`, start of each window and end of the last.
        max_length_q: patches of the largest window.

    Returns:
        `[1, L, H, d]`, and None in place of the attention weights.
    """
    device = query.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query.dtype
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    if kernel_serves(device, dtype):
        parts = q.to(dtype), k.to(dtype), v.to(dtype)
        return _by_kernel(*parts, cu_seq_lens_q, max_length_q, scaling)[None], None
    return _by_size(q, k, v, cu_seq_lens_q, scaling)[None], None


def kernel_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's variable-length kernel computes windows right on this device and dtype.

    Call it before a pass begins: its first call runs a comparison, which must not happen inside a
    checkpointed layer.
    """
    return has_kernel(device, dtype) and _kernel_repeats(device, dtype)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float
) -> Tensor:
    """Return the attention `[L, H, d]` from one call of torch's variable-length kernel."""
    with by_flash():
        out: Any = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)
    attended: Tensor = out
    return attended


def _by_size(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scaling: float) -> Tensor:
    """Return the attention `[L, H, d]` from one call per size of window."""
    windows = _windows_of(ends)
    done = []
    for places, size in windows.by_size:
        q, k, v = (part[places].unflatten(0, (-1, size)).transpose(1, 2) for part in (query, key, value))
        said = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        done.append(said.transpose(1, 2).flatten(0, 1))
    return torch.cat(done)[windows.back]


class _Windows:
    """Indices of patches grouped by the size of their window, and the inverse permutation."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ref(ends)
        sizes = ends.diff()
        self.by_size: list[tuple[Tensor, int]] = []
        for size in sizes.unique().tolist():
            within = torch.arange(size, device=ends.device)
            self.by_size.append(((ends[:-1][sizes == size, None] + within).flatten(), size))
        self.back = torch.cat([places for places, _ in self.by_size]).argsort()


_latest: deque[_Windows] = deque(maxlen=2)
"""The last two layouts, windows and whole images, so that each is computed once per pass of a tower."""


def _windows_of(ends: Tensor) -> _Windows:
    found = next((windows for windows in _latest if windows.ends() is ends), None)
    if found is None:
        found = _Windows(ends)
        _latest.append(found)
    return found


@cache
def _kernel_repeats(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel matches `_by_size` at the head widths of Qwen's towers; test it once."""
    with learning_apart(device):
        return all(_repeats_at(width, device, dtype) for width in (64, 72, 80))


def _repeats_at(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel's values and gradients match those of `_by_size` at one head width."""
    ends = torch.tensor([0, 64, 128, 160, 176], dtype=torch.int32, device=device)

    def outcome(attend: Callable[..., Tensor], *longest: int) -> list[Tensor]:
        """Return the output and the gradients, for the same random inputs at every call."""
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
