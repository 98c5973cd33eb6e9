"""Compute the attention of completions to their prefixes and themselves, with tokens packed without padding.

    queries           a a a | b b b b b | c c       M tokens of N completions, packed
    keys, values    P a a a | Q b b b b b | Q c c   prefix of the group, and the completion up to the query

`VarlenSuffixes` makes one call of a variable-length kernel per layer, in half precision on a GPU.
`PaddedSuffixes` pads the completions for the attention only, and works on every device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from segrl.models.kernels.first_use import learning_apart, repeats

CLOSE = 0.03
"""Largest distance of a half-precision kernel from the plain path, as a share of the norm: both round."""


def shares_keys(kernel: Callable[..., Any]) -> dict[str, bool]:
    """Return the keyword argument with which a variable-length kernel lets query heads share key heads.

    It is empty for torch 2.11, whose kernel shares them whenever there are fewer key heads than query heads.
    """
    return {"enable_gqa": True} if "enable_gqa" in signature(kernel).parameters else {}


def by_flash() -> AbstractContextManager[None]:
    """Return a context in which the kernel is FlashAttention's.

    torch 2.15 prefers cuDNN's, which makes a new plan for every length.
    """
    made: AbstractContextManager[None] = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return made


_SHARES_KEYS: Any = shares_keys(varlen_attn)


class Suffixes(ABC):
    """Layout of N completions behind B prefixes.

    Args:
        attention_mask: bool `[B, P]`, attention mask of the prefixes, false on padding.
        real: bool `[N, T]`, false on padding of the completions; groups contiguous.
    """

    def __init__(self, attention_mask: Tensor, real: Tensor) -> None:
        self.shape, self.group = real.shape, len(real) // len(attention_mask)
        self.places = None if bool(real.all()) else real.flatten().nonzero()[:, 0]  # None: all

    def pack(self, padded: Tensor) -> Tensor:
        """Return the real tokens `[M, ...]` of `[N, T, ...]`."""
        rows = padded.flatten(0, 1)
        return rows if self.places is None else rows[self.places]

    def unpack(self, packed: Tensor) -> Tensor:
        """Return `[N, T, ...]` for the real tokens `[M, ...]`, zero on padding."""
        if self.places is not None:
            zeros = packed.new_zeros(self.shape.numel(), *packed.shape[1:])
            packed = zeros.index_copy(0, self.places, packed)
        return packed.unflatten(0, self.shape)

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        """Return the attention of one layer.

        Args:
            query: `[1, H, M, d]`.
            key: `[1, K, M, d]`, of the completions.
            value: likewise.
            prefix: keys and values of the prefixes, `[B, K, P, d]` each.
            scaling: factor of the scores.

        Returns:
            `[1, M, H, d]`.
        """


class PaddedSuffixes(Suffixes):
    """Layout with one row per completion, padded to the longest; uses `grouped_product`."""

    def __init__(self, attention_mask: Tensor, real: Tensor) -> None:
        super().__init__(attention_mask, real)
        length = real.shape[1]
        own = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
        # If no prefix is padded, one mask serves all completions.
        before = (
            attention_mask[:1]
            if bool(attention_mask.all())
            else attention_mask.repeat_interleave(self.group, 0)
        )
        self.mask = torch.cat(
            [before[:, None, None].expand(-1, 1, length, -1), own.expand(len(before), 1, length, length)], -1
        )
        self.of_heads: Tensor | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        """Return the attention of one layer; see `Suffixes`."""
        q, k, v = (self.unpack(part[0].transpose(0, 1)).transpose(1, 2) for part in (query, key, value))
        keys, values = (
            torch.cat([self._of_each(shared).to(own.dtype), own], 2)
            for shared, own in zip(prefix, (k, v), strict=True)
        )
        if self.of_heads is None:  # the same in every layer
            self.of_heads = per_head_group(self.mask, q.shape[1] // keys.shape[1])
        return self.pack(grouped_product(q, keys, values, self.of_heads, scaling))[None]

    def _of_each(self, shared: Tensor) -> Tensor:
        """Return `[N, ...]`, each row of `[B, ...]` repeated for its group."""
        return shared[:, None].expand(-1, self.group, *shared.shape[1:]).flatten(0, 1)


class VarlenSuffixes(Suffixes):
    """Layout for a variable-length kernel: per completion the keys of its prefix, then its own, unpadded.

    `dtype` is the precision of the passes: autocast leaves queries and keys in float32, which the kernel does
    not accept.
    """

    def __init__(self, attention_mask: Tensor, real: Tensor, dtype: torch.dtype) -> None:
        super().__init__(attention_mask, real)
        self.dtype = dtype
        count, prefix_length = attention_mask.shape
        before, own = attention_mask.repeat_interleave(self.group, 0), real.sum(1)
        attended = torch.cat([before, real], 1) & (own > 0)[:, None]
        starts = (own.cumsum(0) - own)[:, None] + count * prefix_length
        groups = torch.arange(count, device=attention_mask.device).repeat_interleave(self.group)[:, None]
        where = torch.cat(
            [
                groups * prefix_length + torch.arange(prefix_length, device=attention_mask.device),
                starts + torch.arange(real.shape[1], device=attention_mask.device),
            ],
            1,
        )
        # `source`: for each key of the layout, its row in the concatenation of all prefixes and completions.
        # `own_at`, `prefix_at`: the inverse. `prefix_attended` is false where `prefix_at` has no meaning.
        self.source = where[attended]
        to = (attended.flatten().cumsum(0) - 1).view_as(attended)
        self.own_at = to[:, prefix_length:][real]
        self.prefix_at = to[:, :prefix_length].clamp(min=0).view(count, self.group, prefix_length)
        self.prefix_attended = attended[:, :prefix_length].view_as(self.prefix_at)[..., None, None]
        lengths = torch.stack([own, attended.sum(1)])[:, own > 0]
        ends = nn.functional.pad(lengths.cumsum(1), [1, 0]).int()
        self.query_ends, self.key_ends = ends[0].contiguous(), ends[1].contiguous()
        self.most_queries, self.most_keys = lengths.amax(1).tolist()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        """Return the attention of one layer; see `Suffixes`.

        The kernel aligns the causal mask at the last key, so the last key of each query is its own.
        """
        keys, values = (
            _Laid.apply(shared.to(self.dtype), own.to(self.dtype), self)
            for shared, own in zip(prefix, (key, value), strict=True)
        )
        with by_flash():
            out: Any = varlen_attn(
                query[0].transpose(0, 1).to(self.dtype),
                keys,
                values,
                self.query_ends,
                self.key_ends,
                self.most_queries,
                self.most_keys,
                scale=scaling,
                window_size=(-1, 0),
                **_SHARES_KEYS,
            )
        attended: Tensor = out[None]
        return attended


class _Laid(torch.autograd.Function):
    """Gathers prefixes `[B, K, P, d]` and completions `[1, K, M, d]` into the `[S, K, d]` of a layout.

    The gradient of a prefix is summed over its group in float32 and in a fixed order. The gradient of plain
    indexing guarantees neither.
    """

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, own: Tensor, suffixes: VarlenSuffixes) -> Tensor:  # noqa: ANN401
        """Return the keys or values of the layout."""
        ctx.suffixes = suffixes
        return torch.cat([prefix.transpose(1, 2).flatten(0, 1), own[0].transpose(0, 1)])[suffixes.source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        """Return the gradients of the prefixes and of the completions."""
        (gradient,), laid = gradients, ctx.suffixes
        shared = gradient[laid.prefix_at].masked_fill(~laid.prefix_attended, 0).sum(1, dtype=torch.float32)
        own = gradient[laid.own_at].transpose(0, 1)[None]
        return shared.to(gradient.dtype).transpose(1, 2), own, None


def per_head_group(mask: Tensor, shared: int) -> Tensor:
    """Return a mask `[..., T, S]` repeated for `shared` heads of one product, `[..., shared * T, S]`."""
    return mask.repeat(*[1] * (mask.dim() - 2), shared, 1)


def grouped_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return attention in which heads that share keys and values are rows of one product.

    So keys and values are not repeated.

    Args:
        query: `[rows, H, T, d]`.
        key: `[rows, K, S, d]`.
        value: likewise.
        mask: attention mask, bool, broadcast to `[rows, K, H / K * T, S]` (`per_head_group`). If None, all is
            attended to.
        scaling: factor of the scores.

    Returns:
        `[rows, T, H, d]`.
    """
    rows, heads, length, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1] * length, width)
    out = nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return out.view(rows, heads, length, width).transpose(1, 2).contiguous()


def laid_out(attention_mask: Tensor, real: Tensor, dtype: torch.dtype) -> Suffixes:
    """Return the layout that suits the tensors' device and the precision of the passes.

    Args:
        attention_mask: see `Suffixes`.
        real: see `Suffixes`.
        dtype: precision of the passes.
    """
    return (
        VarlenSuffixes(attention_mask, real, dtype)
        if has_kernel(attention_mask.device, dtype)
        else PaddedSuffixes(attention_mask, real)
    )


def half_on_a_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device is a GPU and the dtype is half precision."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `varlen_attn` supports this device and dtype and matches padded attention there."""
    made = half_on_a_gpu(device, dtype) and torch.cuda.get_device_capability(device) >= (8, 0)
    return made and _kernel_repeats(device, dtype)


@cache
def _kernel_repeats(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel matches padded attention at two head widths; test it once per process."""
    with learning_apart(device):
        return all(_repeats_at(width, device, dtype) for width in (64, 128))


def _repeats_at(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel's values and gradients match those of padded attention at one head width."""
    attention_mask = torch.ones(2, 40, dtype=torch.bool, device=device)
    attention_mask[0, 33:] = False
    real = torch.arange(9, device=device) < torch.tensor([5, 1, 9, 0, 7, 3], device=device)[:, None]
    shapes = ((1, 4, 25, width), *[(1, 2, 25, width)] * 2, *[(2, 2, 40, width)] * 2)

    def outcome(layout: Suffixes) -> list[Tensor]:
        """Return the output and the gradients, for the same random inputs at every call."""
        noise = torch.Generator(device).manual_seed(width)
        given = [torch.randn(s, device=device, dtype=dtype, generator=noise).requires_grad_() for s in shapes]
        query, key, value, *prefix = given
        out = layout.attend(query, key, value, (prefix[0], prefix[1]), width**-0.5)
        return [out, *torch.autograd.grad(out.float().square().sum(), given)]

    return repeats(
        f"attention on {device}: padded, not by torch's kernel for unequal lengths",
        lambda: outcome(VarlenSuffixes(attention_mask, real, dtype)),
        lambda: outcome(PaddedSuffixes(attention_mask, real)),
        CLOSE,
    )


def pass_dtype(module: Any) -> torch.dtype:  # noqa: ANN401 - a model of transformers
    """Return the precision of a pass through a module: the autocast dtype if that is on, else its own."""
    kind = module.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.dtype
    dtype: torch.dtype = autocast
    return dtype
