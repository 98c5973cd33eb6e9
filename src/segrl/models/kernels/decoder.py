"""Run the language model for one token of every completion per step, with weights laid out for sampling.

A `Decoder` is built for each rollout, or part of one, from the current weights: projections that read the
same input are joined, in the precision of the passes. The keys and values of a prefix are stored once, and
the queries of its group are rows of one product with them. Completions have buffers of fixed size:

    scores of row (b, g) at step t  =  [ q · prefix keys of b  |  q · own keys 0..t of (b, g) ]

On a GPU a step may be captured as a CUDA graph and replayed (`cuda_graph.py`). Costs per token:
benchmarks/step_profile.py measures them on a CPU, the part `steps` of benchmarks/gpu_parts.py on a GPU;
benchmarks/roofline.py counts them for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segrl.models.kernels import onednn_linear
from segrl.models.kernels.cuda_graph import GraphRecorder
from segrl.types import PrefixState


class PackedLinear:
    """A linear layer whose weight has a layout that is fast for few rows.

    On a CPU that is oneDNN's own layout for float32, where torch has its operations, else column-major order.
    On other devices the weight keeps its layout.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias, self.packed = bias, None
        on_cpu = weight.device.type == "cpu"
        if on_cpu and weight.dtype == torch.float32 and onednn_linear.HAS_ONEDNN:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        else:
            self.weight = weight.t().contiguous().t() if on_cpu else weight

    def __call__(self, given: Tensor) -> Tensor:
        """Return `[N, out]` for `[N, in]`."""
        if self.packed is None:
            return F.linear(given, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(given, self.packed, self.bias, "none", [], "")
        return out


class _FusedLinear(PackedLinear):
    """Linear layers that read the same input, joined into one; their LoRA adapters cost one more product.

    Adapters are not merged: in bfloat16, rounding would remove an update smaller than the weight's last
    digit. Instead the matrices A of all adapters are extra rows of the joined weight. Their matrices sB form
    one matrix, in which each layer has its own columns.
    """

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
        weights = [cast("Tensor", _base(linear).weight) for linear in linears]
        biases = [_base(linear).bias for linear in linears]
        bias = None if biases[0] is None else torch.cat(cast("list[Tensor]", biases)).to(dtype)
        adapters = [
            (narrow.to(dtype), wide.to(dtype), slice(end - len(weight), end))
            for linear, weight, end in zip(linears, weights, accumulate(map(len, weights)), strict=True)
            for narrow, wide in adapters_of(linear)
        ]
        self.size = sum(map(len, weights))
        self.wide: Tensor | None = None
        rows = [weight.to(dtype) for weight in weights] + [narrow for narrow, _, _ in adapters]
        if adapters:
            ranks = [len(narrow) for narrow, _, _ in adapters]
            self.wide = rows[0].new_zeros(sum(ranks), self.size)
            for (_, wide, columns), end, rank in zip(adapters, accumulate(ranks), ranks, strict=True):
                self.wide[end - rank : end, columns] = wide.t()
            bias = None if bias is None else F.pad(bias, (0, sum(ranks)))
        super().__init__((rows[0] if len(rows) == 1 else torch.cat(rows)).detach(), bias)

    def __call__(self, given: Tensor) -> Tensor:
        """Return `[N, out]` for `[N, in]`."""
        out = super().__call__(given)
        if self.wide is None:
            return out
        return out[:, : self.size].addmm_(out[:, self.size :], self.wide)


@dataclass(slots=True, kw_only=True)
class _Layer:
    """Weights of a layer, and its keys and values."""

    norm_in: Tensor
    qkv: _FusedLinear
    norms: tuple[Tensor, ...] | None  # of queries and keys: Qwen3 has them, Qwen2.5 does not
    out: _FusedLinear
    norm_mlp: Tensor
    gate_up: _FusedLinear
    down: _FusedLinear
    prefix_keys: Tensor  # [B, K, d, P]
    prefix_values: Tensor  # [B, K, P, d]
    own: Tensor  # [2, B, K, G, T, d], keys and values of the completions


class Decoder:
    """The language model for B*G completions of at most `length` tokens, which follow B prefixes.

    Args:
        language: `language_model` of a Qwen2.5-VL or Qwen3-VL of transformers.
        state: of the prefixes.
        group_size: completions per prefix.
        length: largest number of tokens of a completion.
        dtype: of the linear layers and the attention; the residual stream keeps the dtype of the embedding.
        stride: the number of own keys that a step reads is rounded up to a multiple of this, and later keys
            are masked. So shapes change once per `stride` steps, and a step can be captured. If None, reads
            the keys written so far.
        recorder: runs steps as CUDA graphs. If None, runs each step eagerly.
    """

    def __init__(
        self,
        language: Any,
        state: PrefixState,
        group_size: int,
        length: int,
        dtype: torch.dtype,
        stride: int | None = None,
        recorder: GraphRecorder | None = None,
    ) -> None:
        config = language.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width: int = language.layers[0].self_attn.head_dim
        self.embedding: Tensor = language.embed_tokens.weight
        self.norm: Tensor = language.norm.weight
        self.eps: float = language.norm.variance_epsilon
        self.scale: float = language.layers[0].self_attn.scaling
        self.groups, self.group, self.place = len(state.attention_mask), group_size, 0
        # A GPU reads rows fast that begin at multiples of 16 bytes, so prefixes get `made_up` masked
        # positions.
        aligned = 1 if stride is None else 8
        self.length, self.stride = -(-length // aligned) * aligned, stride
        self.made_up = -state.attention_mask.shape[1] % aligned
        self.at = torch.zeros(
            1, dtype=torch.long, device=state.next_position.device
        )  # `place`, on the device
        self.recorder, self.dtype = recorder, dtype
        self.layers = [
            self._layer(layer, k, v)
            for layer, k, v in zip(language.layers, state.keys, state.values, strict=True)
        ]
        steps = torch.arange(length, device=state.next_position.device)
        cos, sin = language.rotary_emb(
            self.embedding, (state.next_position[:, None] + steps).expand(3, -1, -1)
        )
        cos, sin = cos.float(), sin.float()  # keep the values of the passes: no second rounding
        half = self.width // 2
        self.cos, self.sin = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        # One multiply-add applies RoPE and the softmax scale s to the joined projection of queries, keys and
        # values: q' = s (q cos + rot(q) sin), k' = k cos + rot(k) sin, v' = v.
        kinds = torch.tensor([self.heads, self.kv_heads, self.kv_heads], device=cos.device)
        turns = torch.tensor([[self.scale, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=cos.dtype, device=cos.device)
        self.turned, self.kept = turns.repeat_interleave(kinds, 0)[..., None].unbind(1)
        unseen = F.pad(state.attention_mask, (0, self.made_up)).logical_not()
        self.unseen = unseen if bool(unseen.any()) else None

    def _layer(self, layer: Any, prefix_keys: Tensor, prefix_values: Tensor) -> _Layer:
        attention, mlp, dtype = layer.self_attn, layer.mlp, self.dtype
        inner = dict(attention.named_parameters())
        shape = 2, self.groups, self.kv_heads, self.group, self.length, self.width
        prefix_keys, prefix_values = (
            F.pad(part.to(dtype), (0, 0, 0, self.made_up)) for part in (prefix_keys, prefix_values)
        )
        return _Layer(
            norm_in=layer.input_layernorm.weight,
            qkv=_FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
            norms=tuple(inner[f"{x}_norm.weight"].to(dtype) for x in "qk")
            if "q_norm.weight" in inner
            else None,
            out=_FusedLinear([attention.o_proj], dtype),
            norm_mlp=layer.post_attention_layernorm.weight,
            gate_up=_FusedLinear([mlp.gate_proj, mlp.up_proj], dtype),
            down=_FusedLinear([mlp.down_proj], dtype),
            prefix_keys=prefix_keys.transpose(-1, -2).contiguous(),
            prefix_values=prefix_values.contiguous(),
            own=prefix_keys.new_zeros(shape, dtype=dtype),
        )

    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of every completion, int64 `[B*G]`.

        Return hidden states `[B*G, D]`, which are valid until the next step.
        """
        stride = self.stride or 1
        upto = min(self.length, -(-(self.place + 1) // stride) * stride)
        read = self._read if self.recorder is None else partial(self.recorder.call, self._read)
        with torch.autocast(tokens.device.type, enabled=False):  # all dtypes are explicit here
            hidden = read(tokens, upto)
        self.place += 1
        self.at += 1
        return hidden

    def _read(self, tokens: Tensor, upto: int) -> Tensor:
        """Return the hidden states of a step that reads the own keys before `upto`."""
        if self.stride is None:
            cos, sin = self.cos[:, self.place], self.sin[:, self.place]
        else:
            cos, sin = self.cos.index_select(1, self.at)[:, 0], self.sin.index_select(1, self.at)[:, 0]
        cos, sin = cos[:, None, None], sin[:, None, None]
        turn = torch.addcmul(self.kept, cos, self.turned), sin * self.turned
        hidden, hides = F.embedding(tokens, self.embedding), self._hides(upto)
        for layer in self.layers:
            hidden = hidden + self._attend(layer, self._normed(hidden, layer.norm_in), turn, upto, hides)
            gate, up = layer.gate_up(self._normed(hidden, layer.norm_mlp)).chunk(2, -1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return F.rms_norm(hidden, hidden.shape[-1:], self.norm.to(hidden.dtype), self.eps)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], weight.to(hidden.dtype), self.eps).to(self.dtype)

    def _hides(self, upto: int) -> Tensor | None:
        """Return the keys to hide, bool `[1 or B, 1, 1, 1, P + upto]`: true on padding and on later keys.

        Return None if all keys are attended to.
        """
        if self.unseen is None and self.stride is None:
            return None
        length = self.layers[0].prefix_values.shape[2]
        unseen = self.at.new_zeros(1, length, dtype=torch.bool) if self.unseen is None else self.unseen
        ahead = torch.arange(upto, device=self.at.device) > self.at
        return torch.cat([unseen, ahead.expand(len(unseen), -1)], 1)[:, None, None, None]

    def _attend(
        self, layer: _Layer, normed: Tensor, turn: tuple[Tensor, Tensor], upto: int, hides: Tensor | None
    ) -> Tensor:
        """Return the attention's output `[B*G, D]` after writing this step's keys and values."""
        kv, per_kv = self.kv_heads, self.heads // self.kv_heads
        qkv = layer.qkv(normed).view(self.groups, self.group, self.heads + 2 * kv, self.width)
        if layer.norms is not None:
            q, k, v = qkv.split([self.heads, kv, kv], 2)
            q, k = (
                F.rms_norm(x, (self.width,), w, self.eps) for x, w in zip((q, k), layer.norms, strict=True)
            )
            qkv = torch.cat([q, k, v], 2)
        turned = torch.addcmul(qkv * turn[0], qkv.roll(self.width // 2, -1), turn[1]).to(self.dtype)
        self._remember(layer.own, turned[:, :, self.heads :])
        q = turned[:, :, : self.heads].unflatten(2, (kv, per_kv)).transpose(1, 2).contiguous()
        to_prefix = q.flatten(2, 3) @ layer.prefix_keys
        to_own = q @ layer.own[0, :, :, :, :upto].transpose(-1, -2)
        scores = torch.cat([to_prefix.view(*q.shape[:-1], -1), to_own], -1)
        weights = (scores if hides is None else scores.masked_fill(hides, float("-inf"))).softmax(-1)
        of_prefix, of_own = weights.split([to_prefix.shape[-1], upto], -1)
        seen = of_prefix.flatten(2, 3) @ layer.prefix_values
        own = of_own.flatten(0, 2), layer.own[1, :, :, :, :upto].flatten(0, 2)
        seen = seen.view(-1, per_kv, self.width).baddbmm_(*own).view(self.groups, kv, self.group, -1)
        return layer.out(seen.transpose(1, 2).reshape(len(normed), -1))

    def _remember(self, own: Tensor, new: Tensor) -> None:
        """Write keys and values `[B, G, 2 * K, d]` to the position of this step in `own`."""
        new = new.unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)
        if self.stride is None:
            own[..., self.place, :] = new
        else:
            own.index_copy_(4, self.at, new[..., None, :])

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Keep some completions and drop the others.

        Args:
            groups: int64 `[B']`, indices of the groups to keep.
            rows: int64 `[B', G']`, indices of the completions to keep in each of these groups.
        """
        everywhere = rows[:, None, :]
        heads = torch.arange(self.kv_heads, device=rows.device)[None, :, None]
        for layer in self.layers:
            layer.prefix_keys, layer.prefix_values = layer.prefix_keys[groups], layer.prefix_values[groups]
            layer.own = layer.own[:, groups[:, None, None], heads, everywhere]
        self.cos, self.sin = self.cos[groups], self.sin[groups]
        self.unseen = None if self.unseen is None else self.unseen[groups]
        self.groups, self.group = rows.shape
        if self.recorder is not None:
            self.recorder.forget()  # the graph holds the addresses of the old buffers


def _base(linear: nn.Module) -> nn.Linear:
    from peft.tuners.lora import LoraLayer

    return cast("nn.Linear", linear.get_base_layer() if isinstance(linear, LoraLayer) else linear)


def adapters_of(linear: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the active LoRA adapters of a linear layer: A `[r, in]` and sB `[out, r]`, scaled by s."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return []
    return [
        (cast("Tensor", linear.lora_A[name].weight), linear.lora_B[name].weight * linear.scaling[name])
        for name in linear.active_adapters
    ]


def linear_weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer with its active adapters added, `W + s B A`."""
    weight = cast("Tensor", _base(linear).weight)
    for narrow, wide in adapters_of(linear):
        weight = weight + (wide @ narrow).to(weight.dtype)
    return weight
