"""Completions behind their prefixes: their tokens lie in one row, without padding; what each attends to is said here.

    M tokens             a a a | b b b b b | c c           of N completions, one behind the other
    what they attend to  P a a a | Q b b b b b | Q c c     the prefix of their group, and themselves up to their own place

`Segments` is one call of a variable-length kernel per layer, for half precision on a GPU. `SideBySide` pads the attention alone, anywhere.
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
"""How far a kernel in half precision may be from the plain path, as a share of its norm: both round, each otherwise."""


def shares_keys(kernel: Callable[..., Any]) -> dict[str, bool]:
    """Return the keyword by which a variable-length kernel lets query heads share keys.

    torch 2.11 has no such keyword: its kernel shares them whenever there are fewer key heads than query heads.
    """
    return {"enable_gqa": True} if "enable_gqa" in signature(kernel).parameters else {}


def by_flash() -> AbstractContextManager[None]:
    """Inside, the kernel is FlashAttention's: cuDNN's, which torch 2.15 prefers, is planned anew for every length."""
    made: AbstractContextManager[None] = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return made


_SHARES_KEYS: Any = shares_keys(varlen_attn)


class Suffixes(ABC):
    """N completions, of which some tokens are real.

    Args:
        seen: bool `[B, P]`, false on the padding of prefixes.
        real: bool `[N, T]`, groups contiguous.
    """

    def __init__(self, seen: Tensor, real: Tensor) -> None:
        self.shape, self.group = real.shape, len(real) // len(seen)
        self.places = None if bool(real.all()) else real.flatten().nonzero()[:, 0]  # None: all

    def pack(self, padded: Tensor) -> Tensor:
        """`[N, T, ...]` to `[M, ...]`."""
        rows = padded.flatten(0, 1)
        return rows if self.places is None else rows[self.places]

    def unpack(self, packed: Tensor) -> Tensor:
        """`[M, ...]` to `[N, T, ...]`, zero where nothing is real."""
        if self.places is not None:
            zeros = packed.new_zeros(self.shape.numel(), *packed.shape[1:])
            packed = zeros.index_copy(0, self.places, packed)
        return packed.unflatten(0, self.shape)

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: `[1, H, M, d]`.
            key: `[1, K, M, d]`, of the completions themselves.
            value: likewise.
            prefix: keys and values `[B, K, P, d]`.
            scaling: of the products.

        Returns:
            `[1, M, H, d]`.
        """


class SideBySide(Suffixes):
    """Each completion a row of its own, padded to the longest; heads that share keys are rows of one product."""

    def __init__(self, seen: Tensor, real: Tensor) -> None:
        super().__init__(seen, real)
        length = real.shape[1]
        own = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
        # One mask for all where no prefix is padded.
        before = seen[:1] if bool(seen.all()) else seen.repeat_interleave(self.group, 0)
        self.mask = torch.cat(
            [before[:, None, None].expand(-1, 1, length, -1), own.expand(len(before), 1, length, length)], -1
        )
        self.of_heads: Tensor | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        """See `Suffixes`."""
        q, k, v = (self.unpack(part[0].transpose(0, 1)).transpose(1, 2) for part in (query, key, value))
        keys, values = (
            torch.cat([self._of_each(shared).to(own.dtype), own], 2)
            for shared, own in zip(prefix, (k, v), strict=True)
        )
        if self.of_heads is None:  # of every layer the same
            self.of_heads = per_head_group(self.mask, q.shape[1] // keys.shape[1])
        return self.pack(grouped_product(q, keys, values, self.of_heads, scaling))[None]

    def _of_each(self, shared: Tensor) -> Tensor:
        """`[B, ...]` to `[N, ...]`."""
        return shared[:, None].expand(-1, self.group, *shared.shape[1:]).flatten(0, 1)


class Segments(Suffixes):
    """Keys and values laid out completion by completion behind those of its prefix, for a kernel of unequal lengths.

    `dtype` is that of the passes: autocast leaves queries and keys in float32, which the kernel does not take.
    """

    def __init__(self, seen: Tensor, real: Tensor, dtype: torch.dtype) -> None:
        super().__init__(seen, real)
        self.dtype = dtype
        count, prefix_length = seen.shape
        before, own = seen.repeat_interleave(self.group, 0), real.sum(1)
        attended = torch.cat([before, real], 1) & (own > 0)[:, None]
        starts = (own.cumsum(0) - own)[:, None] + count * prefix_length
        groups = torch.arange(count, device=seen.device).repeat_interleave(self.group)[:, None]
        where = torch.cat(
            [
                groups * prefix_length + torch.arange(prefix_length, device=seen.device),
                starts + torch.arange(real.shape[1], device=seen.device),
            ],
            1,
        )
        # Of each attended place its row among those of prefixes and completions, and back.
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
        """See `Suffixes`. A query's last key is its own: the kernel aligns causality at the end."""
        keys, values = (
            _Laid.apply(shared.to(self.dtype), own.to(self.dtype), self)
            for shared, own in zip(prefix, (key, value), strict=True)
        )
        with by_flash():
            out: Any = varlen_attn(
                query[0].transpose(0, 1).to(self.dtype), keys, values, self.query_ends, self.key_ends, self.most_queries,
                self.most_keys, scale=scaling, window_size=(-1, 0), **_SHARES_KEYS,
            )  # fmt: skip
        attended: Tensor = out[None]
        return attended


class _Laid(torch.autograd.Function):
    """`[B, K, P, d]` and `[1, K, M, d]` to the attended places `[S, K, d]`.

    A prefix is attended to by its whole group: its gradients are added in float32 and in one order, which the
    gradient of an index would not do.
    """

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, own: Tensor, suffixes: Segments) -> Tensor:  # noqa: ANN401 - autograd's own
        """Copy by the layout."""
        ctx.suffixes = suffixes
        return torch.cat([prefix.transpose(1, 2).flatten(0, 1), own[0].transpose(0, 1)])[suffixes.source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401 - autograd's own
        """Add up by the layout."""
        (gradient,), laid = gradients, ctx.suffixes
        shared = gradient[laid.prefix_at].masked_fill(~laid.prefix_attended, 0).sum(1, dtype=torch.float32)
        own = gradient[laid.own_at].transpose(0, 1)[None]
        return shared.to(gradient.dtype).transpose(1, 2), own, None


def per_head_group(mask: Tensor, shared: int) -> Tensor:
    """Return a mask `[..., T, S]` for rows of which `shared` heads follow each other, `[..., shared * T, S]`."""
    return mask.repeat(*[1] * (mask.dim() - 2), shared, 1)


def grouped_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention in which the heads that share keys and values are rows of one product, so that neither is repeated.

    Args:
        query: `[rows, H, T, d]`.
        key: `[rows, K, S, d]`.
        value: likewise.
        mask: bool, broadcast to `[rows, K, H / K * T, S]` (`per_head_group`); None hides nothing.
        scaling: of the products.

    Returns:
        `[rows, T, H, d]`.
    """
    rows, heads, length, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1] * length, width)
    out = nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return out.view(rows, heads, length, width).transpose(1, 2).contiguous()


def laid_out(seen: Tensor, real: Tensor, dtype: torch.dtype) -> Suffixes:
    """The layout for where the tensors are, and the precision of their passes."""
    return Segments(seen, real, dtype) if has_kernel(seen.device, dtype) else SideBySide(seen, real)


def half_on_a_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether passes are in half precision on a GPU."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's kernel for unequal lengths serves passes of this precision on a device."""
    made = half_on_a_gpu(device, dtype) and torch.cuda.get_device_capability(device) >= (8, 0)
    return made and _kernel_repeats(device, dtype)


@cache
def _kernel_repeats(device: torch.device, dtype: torch.dtype) -> bool:
    """Hold the kernel against padded attention, values and gradients, once in a process."""
    with learning_apart(device):
        return all(_repeats_at(width, device, dtype) for width in (64, 128))


def _repeats_at(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Hold it against padded attention at one head width."""
    seen = torch.ones(2, 40, dtype=torch.bool, device=device)
    seen[0, 33:] = False
    real = torch.arange(9, device=device) < torch.tensor([5, 1, 9, 0, 7, 3], device=device)[:, None]
    shapes = ((1, 4, 25, width), *[(1, 2, 25, width)] * 2, *[(2, 2, 40, width)] * 2)

    def outcome(layout: Suffixes) -> list[Tensor]:
        """Return the output and the gradients, of the same noise each time."""
        noise = torch.Generator(device).manual_seed(width)
        given = [torch.randn(s, device=device, dtype=dtype, generator=noise).requires_grad_() for s in shapes]
        query, key, value, *prefix = given
        out = layout.attend(query, key, value, (prefix[0], prefix[1]), width**-0.5)
        return [out, *torch.autograd.grad(out.float().square().sum(), given)]

    return repeats(
        f"attention on {device}: padded, not by torch's kernel for unequal lengths",
        lambda: outcome(Segments(seen, real, dtype)),
        lambda: outcome(SideBySide(seen, real)),
        CLOSE,
    )


def pass_dtype(module: Any) -> torch.dtype:  # noqa: ANN401 - a model of transformers
    """Return the precision of passes through a module, here and now."""
    kind = module.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.dtype
    dtype: torch.dtype = autocast
    return dtype
