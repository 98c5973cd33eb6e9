"""The language model's head in training: log-probabilities of chosen tokens, without the logits of a vocabulary each.

Buys memory: logits of 16,384 tokens and 151,936 words are 10 GB in float32, and as much again for their gradient
(benchmarks/memory.py).
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
"""Probabilities (float32) of one chunk, by kind of device: a pass of no more keeps them for its backward pass, a longer one
computes them again. Each chunk reads and writes the gradient of the whole head: on a GPU most of what small ones would take."""


def chunk_on(device: torch.device) -> int:
    """Return the probabilities of one chunk on a device."""
    return _CHUNK.get(device.type, _CHUNK["cpu"])


def may_round(device: torch.device) -> bool:
    """Whether factors of float32 products may be rounded to TF32: on a GPU under autocast, where they come out of half precision anyway.

    TF32 keeps 10 bits of 23, where bfloat16 keeps 7, and is several times as fast.
    """
    return device.type == "cuda" and torch.is_autocast_enabled("cuda")


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Inside, products of float32 stay float32, whatever autocast says: bfloat16 logits are wrong in the third digit."""
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
        """Of a pass that fits, the probabilities stay for the backward pass; the largest one gives the sum of all without another pass."""
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
        """The gradient of a logit is that of its token (one where chosen, less the probability)."""
        with float32_products(grads[0].device, ctx.tf32):  # what is computed again is what it was
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
    """Log-probabilities float32 `[R]` of tokens `[R]` in states `[R, D]`, under a softmax over all that may be sampled.

    Args:
        hidden: float32, divided by the temperature.
        weight: float32 `[V, D]`, the head.
        tokens: int64, none of `never`.
        never: int64, tokens without probability.
        most: numbers in one chunk of logits; a pass of no more keeps them, a longer one computes them again. If None,
            takes what suits the device.
    """
    most = chunk_on(hidden.device) if most is None else most
    tf32 = may_round(hidden.device)
    with float32_products(hidden.device, tf32):
        done: Tensor = _TokenLogprobs.apply(hidden, weight, tokens, never, most, tf32)
    return done
