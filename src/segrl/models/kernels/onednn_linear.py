"""Compute linear layers and the patch embedding as matrix products, by oneDNN on CPUs where it is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _has_ops(*names: str) -> bool:
    """Return whether this torch has oneDNN's operations of these names; they are not public."""
    try:
        return all(getattr(torch.ops.mkldnn, name) is not None for name in names)
    except AttributeError:
        return False


HAS_ONEDNN = torch.backends.mkldnn.is_available() and _has_ops("_linear_pointwise", "_reorder_linear_weight")
"""Whether this torch has oneDNN's operations; if False, torch computes every product."""

FASTER = HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether oneDNN multiplies large matrices faster than the library that torch calls.

With AVX-512 on AMD it is twice as fast: a step of benchmarks/grpo_step.py takes a quarter less time. With
AVX2 it is slower, by a sixth of the learning part of benchmarks/step_profile.py.
"""


def rows_by_rows(one: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `one @ other.T + bias`, `[M, N]`; both factors may be transposed views.

    oneDNN's operation has no gradient: `Linear`, `Patches` and `token_logprobs` have their own backward
    passes.

    Args:
        one: `[M, K]`.
        other: `[N, K]`.
        bias: `[N]`; if None, nothing is added.
    """
    if _by_onednn(one, other):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(one, other, bias, "none", [], "")
        return out
    return nn.functional.linear(one, other, bias)


def add_columns_by_columns(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add `one.T @ other` to `total` in place.

    Args:
        total: `[N, K]`.
        one: `[M, N]`.
        other: `[M, K]`.
    """
    if _by_onednn(one, other):
        total += rows_by_rows(other.t(), one.t()).t()  # oneDNN is faster in this order
    else:
        total.addmm_(one.t(), other)


def _by_onednn(one: Tensor, other: Tensor) -> bool:
    on_cpu = one.device.type == "cpu" and one.dtype == other.dtype == torch.float32
    return FASTER and on_cpu and one.numel() > 0 and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[M, N]` for `[M, K]`."""
        ctx.save_for_backward(given, weight)
        return rows_by_rows(given.detach(), weight.detach(), None if bias is None else bias.detach())

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, the weight and the bias."""
        (gradient,), (given, weight), needed = gradients, ctx.saved_tensors, ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            rows_by_rows(gradient, weight.detach().t()) if needed[0] else None,
            rows_by_rows(given.t(), gradient.t()).t() if needed[1] else None,
            gradient.sum(0) if needed[2] else None,
        )


class Linear(nn.Linear):
    """A linear layer that uses oneDNN for float32 on a CPU where it is faster, and torch elsewhere.

    Args:
        linear: the layer that it replaces; its parameters are shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, device="meta")
        self.__dict__.update(linear.__dict__)

    def forward(self, input: Tensor) -> Tensor:
        """Return `[..., N]` for `[..., K]`."""
        if not _by_onednn(input, self.weight):
            return super().forward(input)
        out: Tensor = _Linear.apply(input.flatten(0, -2), self.weight, self.bias)
        return out.unflatten(0, input.shape[:-1])


class Patches(nn.Conv3d):
    """A convolution over patches that do not overlap, computed as one matrix product.

    A convolution of many small images is slow. The product saves a third of the nano tower's CPU time in
    float32, and nearly all of the patch embedding's in bfloat16 (benchmarks/patches.py; on a GPU: the part
    `kernels` of benchmarks/gpu_parts.py).

    Args:
        convolution: the layer that it replaces; its parameters are shared. Each input `[C, t, h, w]` has the
            kernel's size.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__(1, 1, 1, device="meta")
        self.__dict__.update(convolution.__dict__)

    def forward(self, input: Tensor) -> Tensor:
        """Return `[N, D, 1, 1, 1]` for `[N, C, t, h, w]`."""
        rows, weight = input.flatten(1), self.weight.flatten(1)
        if not _by_onednn(rows, weight):
            return nn.functional.linear(rows, weight, self.bias)[..., None, None, None]
        out: Tensor = _Linear.apply(rows, weight, self.bias)
        return out[..., None, None, None]


def take_products(model: nn.Module) -> None:
    """Replace each `nn.Linear` by `Linear`, and each `nn.Conv3d` whose kernel equals its stride by `Patches`.

    Names of parameters do not change.
    """
    for layer in list(model.modules()):
        for name, inner in list(layer.named_children()):
            if type(inner) is nn.Linear:
                setattr(layer, name, Linear(inner))
            elif type(inner) is nn.Conv3d and inner.kernel_size == inner.stride:
                setattr(layer, name, Patches(inner))
