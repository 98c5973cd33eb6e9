"""Time single operations whose speed on a GPU is uncertain, at the shapes of a 3B policy.

Findings are in milliseconds, TFLOP/s and GB/s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_kit.clock import milliseconds, wait
from gpu_kit.findings import Findings


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of the arguments: those of a step of a 3B policy, or tiny ones."""

    patches: int = 8 * 2916
    image: int = 2916
    tower: int = 1280
    tower_heads: int = 16
    tower_width: int = 80
    prompts: int = 8
    group: int = 8
    prefix: int = 768
    length: int = 255
    heads: int = 16
    shared: int = 2
    width: int = 128
    hidden: int = 2048
    inner: int = 11008
    vocabulary: int = 151936

    @property
    def rows(self) -> int:
        """Return the number of completions."""
        return self.prompts * self.group


TINY = Shapes(
    patches=64, image=64, tower=128, tower_heads=2, prompts=2, group=2, prefix=16, length=8, heads=4,
    width=32, hidden=64, inner=64, vocabulary=512,
)  # fmt: skip


class Bench:
    """Times operations and says what they took.

    Args:
        findings: of the part.
        device: of the operations.
        shapes: of their arguments.
    """

    def __init__(self, findings: Findings, device: torch.device, shapes: Shapes) -> None:
        self.findings, self.device, self.shapes = findings, device, shapes

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, learn: bool = False) -> Tensor:
        """Return noise on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype, requires_grad=learn)

    def both(
        self,
        name: str,
        forward: Callable[[], Tensor],
        learn: list[Tensor],
        gflop: float = 0,
        factor: float = 2.5,
    ) -> None:
        """Say the milliseconds of a forward and a backward pass.

        The backward pass has `factor` times the arithmetic of the forward pass.
        """

        def one() -> None:
            out = forward()
            gradient = torch.randn_like(out)
            ahead = milliseconds(forward, self.device)
            back = milliseconds(
                lambda: torch.autograd.grad(out, learn, gradient, retain_graph=True), self.device
            )
            line = {"forward_ms": round(ahead, 3), "backward_ms": round(back, 3)}
            if gflop:
                line["forward_tflops"] = round(gflop / ahead, 1)
                line["backward_tflops"] = round(factor * gflop / back, 1)
            self.findings.say(name=name, **line)

        self.findings.tried(name, one)

    def alone(self, name: str, work: Callable[[], Any], gbytes: float = 0) -> None:
        """Say the milliseconds of a call without gradients."""

        def one() -> None:
            with torch.no_grad():
                taken = milliseconds(work, self.device)
            line = {"ms": round(taken, 3)}
            if gbytes:
                line["gb_per_s"] = round(1e3 * gbytes / taken)
            self.findings.say(name=name, **line)

        self.findings.tried(name, one)


def kernels(findings: Findings, device: torch.device, rehearse: bool) -> None:
    """Time every operation."""
    bench = Bench(findings, device, TINY if rehearse else Shapes())
    for part in (tower, prefixes, new_lengths, completions, sampling, adapters, head):
        findings.tried(part.__name__, partial(part, bench))


def tower(bench: Bench) -> None:
    """Time the vision tower's patch embedding and its attention.

    The patch embedding is timed as a convolution over disjoint patches and as one product.
    """
    from segrl.models.kernels.window_attention import window_attention

    s = bench.shapes
    pixels, weight = bench.random(s.patches, 1176), bench.random(s.tower, 3, 2, 14, 14, learn=True)
    bench.both(
        "patch embedding, Conv3d",
        lambda: F.conv3d(pixels.view(-1, 3, 2, 14, 14), weight, stride=(2, 14, 14)).view(-1, s.tower),
        [weight],
    )
    bench.both("patch embedding, one product", lambda: F.linear(pixels, weight.flatten(1)), [weight])
    for name, size in (("windows", 64), ("images", s.image)):
        count = (s.patches // size) * size
        qkv = bench.random(count, 3, s.tower_heads, s.tower_width, learn=True)
        ends = torch.arange(0, count + 1, size, device=bench.device, dtype=torch.int32)

        def attention(qkv: Tensor = qkv, ends: Tensor = ends, size: int = size) -> Tensor:
            parts = [part.transpose(0, 1)[None] for part in qkv.permute(1, 0, 2, 3).unbind(0)]
            return window_attention(None, *parts, None, s.tower_width**-0.5, ends, size)[0]

        work = 4e-9 * count * size * s.tower_heads * s.tower_width
        bench.both(f"tower attention, {name}", attention, [qkv], work)


def _prefix(bench: Bench, length: int) -> list[Tensor]:
    """Return queries, keys and values of prefixes."""
    s = bench.shapes
    return [
        bench.random(s.prompts, heads, length, s.width, learn=True) for heads in (s.heads, s.shared, s.shared)
    ]


def prefixes(bench: Bench) -> None:
    """Time the causal attention of prefixes, and say which backend torch takes."""
    s = bench.shapes
    query, key, value = given = _prefix(bench, s.prefix)
    work = 2e-9 * s.prompts * s.heads * s.prefix**2 * s.width
    causal = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    bench.both("prefix attention, causal", lambda: causal(query, key, value), given, work)
    if bench.device.type == "cuda":  # torch has no public way to ask
        choice = torch._fused_sdp_choice(query, key, value, is_causal=True, enable_gqa=True)
        names = ("math", "flash", "efficient", "cudnn", "other")
        bench.findings.say(name="prefix attention, backend", causal=names[choice])


@contextmanager
def _cudnn(on: bool) -> Any:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def new_lengths(bench: Bench) -> None:
    """Time the first call at each new length: cuDNN plans anew, for the forward and the backward pass."""
    s = bench.shapes
    given = [part.detach() for part in _prefix(bench, s.prefix)]
    for cudnn, first in ((True, 9), (False, 4)):
        taken = []
        for size in range(s.prefix - first, s.prefix - first + 3):
            parts = [part[:, :, :size].detach().requires_grad_() for part in given]
            wait(bench.device)
            began = time.perf_counter()
            with _cudnn(cudnn):
                out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
                torch.autograd.grad(out.float().square().sum(), parts)
            wait(bench.device)
            taken.append(round(1e3 * (time.perf_counter() - began), 2))
        bench.findings.say(name="prefix attention, a new length each time", cudnn=cudnn, first_calls_ms=taken)


def completions(bench: Bench) -> None:
    """Time the attention of completions to their prefixes: in one call of the kernel, and padded."""
    from segrl.models.kernels import suffix_attention

    s = bench.shapes
    _, key, value = _prefix(bench, s.prefix)
    seen = torch.ones(s.prompts, s.prefix, dtype=torch.bool, device=bench.device)
    real = torch.ones(s.rows, s.length, dtype=torch.bool, device=bench.device)
    count = s.rows * s.length
    given = [bench.random(1, heads, count, s.width, learn=True) for heads in (s.heads, s.shared, s.shared)]
    work = 4e-9 * count * (s.prefix + s.length / 2) * s.heads * s.width
    layouts: list[tuple[str, Any]] = [("padded", suffix_attention.PaddedSuffixes)]
    if suffix_attention.has_kernel(bench.device, torch.bfloat16):
        layouts.insert(0, ("kernel", partial(suffix_attention.VarlenSuffixes, dtype=torch.bfloat16)))
    for name, layout in layouts:
        made = layout(seen, real)
        attend = partial(made.attend, *given, (key, value), s.width**-0.5)
        bench.both(f"completions' attention, {name}", attend, [*given, key, value], work)


def sampling(bench: Bench) -> None:
    """Time the parts of sampling one token: products of few rows with all weights, and the draw."""
    from segrl.rollout.shared_prefix import sample_tokens

    s = bench.shapes
    for name, out, into in (("gate and up", 2 * s.inner, s.hidden), ("down", s.hidden, s.inner)):
        product = partial(F.linear, bench.random(s.rows, into), bench.random(out, into))
        bench.alone(f"sampling, {name}", product, 2e-9 * out * into)
    given = bench.random(s.rows, s.hidden)
    weight = bench.random(s.vocabulary, s.hidden, dtype=torch.float32)
    for precision in ("highest", "high"):

        def rounded(precision: str = precision) -> Tensor:
            torch.set_float32_matmul_precision(precision)
            try:
                return F.linear(given.float(), weight)
            finally:
                torch.set_float32_matmul_precision("highest")

        bench.alone(f"sampling, head in float32, {precision}", rounded, 4e-9 * weight.numel())
    half = weight.bfloat16()
    bench.alone("sampling, head in bfloat16", lambda: F.linear(given, half), 2e-9 * weight.numel())
    logits = bench.random(s.rows, s.vocabulary, dtype=torch.float32)
    noise = torch.rand(s.rows, device=bench.device, dtype=torch.float64)
    bench.alone(
        "sampling, softmax and draw", lambda: sample_tokens(logits.softmax(-1), noise), 8e-9 * logits.numel()
    )
    never = torch.arange(s.vocabulary - 271, s.vocabulary, device=bench.device)
    bench.alone("sampling, index_fill", lambda: logits.index_fill_(-1, never, float("-inf")))


def adapters(bench: Bench) -> None:
    """Time a product with an adapter of rank 64, as sampling computes it, and a product without one.

    The adapter's narrow half is computed as additional rows of the weight.
    """
    s, rank = bench.shapes, 64
    given, joined = bench.random(s.rows, s.hidden), bench.random(s.inner + rank, s.hidden)
    wide, weight = bench.random(rank, s.inner), bench.random(s.inner, s.hidden)

    def beside() -> Tensor:
        out = F.linear(given, joined)
        return out[:, : s.inner].addmm_(out[:, s.inner :], wide)

    bench.alone("sampling, a weight with an adapter", beside, 2e-9 * joined.numel())
    bench.alone("sampling, a weight without", lambda: F.linear(given, weight), 2e-9 * weight.numel())


def head(bench: Bench) -> None:
    """Time the head and the norm of a pass that learns."""
    from segrl.models.kernels.token_logprobs import token_logprobs

    s = bench.shapes
    count = s.rows * (s.length + 1)
    states = bench.random(count, s.hidden, dtype=torch.float32, learn=True)
    weight = bench.random(s.vocabulary, s.hidden, dtype=torch.float32, learn=True)
    chosen = torch.randint(0, s.vocabulary - 300, (count,), device=bench.device)
    never = torch.arange(s.vocabulary - 271, s.vocabulary, device=bench.device)

    def picked() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, cache_enabled=False):
            return token_logprobs(states, weight, chosen, never)

    work = 2e-9 * count * weight.numel()  # the backward pass computes the logits again
    bench.both("head of completions, TF32", picked, [states, weight], work, factor=3)
    norm = bench.random(s.hidden, dtype=torch.float32, learn=True)
    bench.both("norm of completions", lambda: F.rms_norm(states, (s.hidden,), norm, 1e-6), [states, norm])
