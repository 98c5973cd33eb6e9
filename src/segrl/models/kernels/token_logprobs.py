"""Compute log-probabilities of given tokens from hidden states in chunks, without keeping all logits.

This saves memory: logits of 16,384 tokens and a vocabulary of 151,936 take 10 GB in float32, and their
gradient as much again (benchmarks/memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segrl.models.kernels.onednn_linear import add_columns_by_columns, rows_by_rows

_CHUNK = {"cpu": 2**26, "cuda": 2**28}
"""Largest number of float32 logits in one chunk, by kind of device.

The backward pass reuses the probabilities of a pass of one chunk, and recomputes those of a longer pass. Each
chunk reads and writes the gradient of the whole head, which on a GPU would dominate the time of small chunks.
"""


def chunk_on(device: torch.device) -> int:
    """Return the largest number of logits in one chunk on a device."""
    return _CHUNK.get(device.type, _CHUNK["cpu"])


def may_round(device: torch.device) -> bool:
    """Return whether factors of float32 products may be rounded to TF32: on a GPU under autocast.

    There the hidden states come from half-precision layers anyway. TF32 keeps 10 of float32's 23 mantissa
    bits (bfloat16: 7) and is several times as fast.
    """
    return device.type == "cuda" and torch.is_autocast_enabled("cuda")


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Disable autocast inside, so that products of float32 stay float32.

    bfloat16 logits would be wrong in the third digit.

    Args:
        device: of the products.
        tf32: whether their factors may be rounded to TF32.
    """
    with torch.autocast(device.type, enabled=False):
        if not tf32:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, never: Tensor, most: int, tf32: bool
    ) -> Tensor:  # fmt: skip
        """Return the log-probabilities `[R]`; save the probabilities for `backward` if R fits one chunk.

        The logarithm of the softmax's denominator is the largest logit minus the logarithm of the largest
        probability.
        """
        size = max(1, most // len(weight))
        picked, kept = [], None
        for states, chosen in zip(hidden.split(size), tokens.split(size), strict=True):
            logits = _logits(states, weight, never)
            probabilities = logits.softmax(-1)
            total = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
            picked.append((logits.gather(-1, chosen[:, None]) - total)[:, 0])
            if len(hidden) <= size:
                kept = probabilities
        ctx.save_for_backward(hidden, weight, tokens, never, kept)
        ctx.size, ctx.tf32 = size, tf32
        return torch.cat(picked)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the hidden states and the weight.

        The gradient of row r's logit v is `grads[r] (1[v = tokens[r]] - p[r, v])`.
        """
        with float32_products(grads[0].device, ctx.tf32):  # recomputed logits equal those of the forward pass
            return _TokenLogprobs._gradients(ctx, grads[0])

    @staticmethod
    def _gradients(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, never, kept = ctx.saved_tensors
        of_hidden, of_weight = [], torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for states, chosen, grad in zip(
            hidden.split(ctx.size), tokens.split(ctx.size), grads.split(ctx.size), strict=True
        ):
            probabilities = _logits(states, weight, never).softmax(-1) if kept is None else kept
            of_logits = probabilities.mul(-grad[:, None])
            of_logits.scatter_add_(1, chosen[:, None], grad[:, None])
            of_hidden.append(rows_by_rows(of_logits, weight.t()))
            if of_weight is not None:
                add_columns_by_columns(of_weight, of_logits, states)
        return torch.cat(of_hidden), of_weight, None, None, None, None


def _logits(states: Tensor, weight: Tensor, never: Tensor) -> Tensor:
    return rows_by_rows(states, weight).index_fill_(-1, never, float("-inf"))


def token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, never: Tensor, most: int | None = None
) -> Tensor:
    """Return log-probabilities, float32 `[R]`, under a softmax over all tokens of the vocabulary but `never`.

    Args:
        hidden: float32 `[R, D]`, hidden states divided by the temperature.
        weight: float32 `[V, D]`, the head.
        tokens: int64 `[R]`, none of `never`.
        never: int64, tokens of probability zero.
        most: largest number of logits in one chunk. The backward pass reuses the probabilities of a pass of
            one chunk, and recomputes those of a longer pass. If None, uses `chunk_on` the device.
    """
    most = chunk_on(hidden.device) if most is None else most
    tf32 = may_round(hidden.device)
    with float32_products(hidden.device, tf32):
        done: Tensor = _TokenLogprobs.apply(hidden, weight, tokens, never, most, tf32)
    return done
