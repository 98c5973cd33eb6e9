"""One prefix and its group of completions: the prefix is read once, and shared.

    prefix        p p p p p p p p p         vision tower and language model once: keys and values of every layer, [B, P]
    completions   `---------------- a a a       each sees its prefix and itself, and none of its neighbours, [B*G, T]
                  `---------------- b b b b b
                  `---------------- c c

Cost grows with P + G*T, not with G*(P + T). In training the gradients of the whole group add up in the prefix's keys
and values and flow back through it once: on a CPU an update of the nano policy takes 3.4 times less time than with a row per
completion (benchmarks/shared_prefix.py). In sampling (`decoder.py`) the prefix's keys and values are stored once.

The layers are transformers' own; what they attend to is given from here, and of a prefix's last layer only the row that predicts is
gone through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segrl.models.kernels.pinned import sent
from segrl.models.kernels.suffix_attention import (
    Suffixes,
    grouped_product,
    half_on_a_gpu,
    laid_out,
    pass_dtype,
)
from segrl.models.kernels.vision_tower import image_features
from segrl.types import Prefix, PrefixState

_Passed = tuple[Tensor, Tensor, Tensor]
"""Hidden states behind a layer, its keys, its values."""
_Out = TypeVar("_Out")
_PLANNED = 32
"""On a GPU in half precision prefixes are padded to a multiple of so many tokens: cuDNN plans anew for every length."""


class _Kept:
    """Stands where transformers' layers keep a cache, and keeps a layer's own keys and values."""

    def __init__(self) -> None:
        self.own: tuple[Tensor, Tensor]

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by the attention of a layer with `[rows, K, T, d]`; return what it is to attend to."""
        self.own = keys, values
        return keys, values


class _Given:
    """Stands there, too, and has keys and values already, the layer's own among them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.whole = keys, values

    def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by the attention of a layer; return what it is to attend to."""
        return self.whole


@cache
def memory_keyword(layer: type[nn.Module]) -> str:
    """Return the keyword by which layers of a class take their memory: `cache` since transformers 5.24."""
    return "cache" if "cache" in signature(layer.forward).parameters else "past_key_values"


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    behind: tuple[Suffixes, tuple[Tensor, Tensor]] | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers' layers call it, for prefixes and for what stands behind them.

    Args:
        module: the layer's attention; not looked at.
        query: `[rows, H, T, d]`.
        key: `[rows, K, S, d]`.
        value: `[rows, K, S, d]`.
        attention_mask: bool, broadcast to `[rows, 1, T, S]`; None is causal.
        scaling: of the products.
        behind: for completions, their layout and the keys and values `[B, K, P, d]` of their prefixes.

    Returns:
        `[rows, T, H, d]`, as transformers' attention functions do.
    """
    if behind is not None:
        suffixes, prefix = behind
        return suffixes.attend(query, key, value, prefix, scaling), None
    if attention_mask is None and query.shape[2] > 1:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    return grouped_product(query, key, value, attention_mask, scaling), None


def _through(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> _Passed:
    """Pass one layer causally. Without side effects, so that it may run twice."""
    memory = _Kept()
    given = {memory_keyword(layer.__class__): memory}
    out = layer(hidden, attention_mask=None, position_embeddings=rope, **given)
    return out, *memory.own


def _last_row(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], last: Tensor, mask: Tensor | None
) -> _Passed:  # fmt: skip
    """As `_through`, but the hidden states `[B, 1, D]` of each prefix's last token alone."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    k, v = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape).transpose(1, 2)
    norms = dict(attention.named_children())  # Qwen3 norms keys, Qwen2.5 does not
    k = (norms["k_norm"](k) if "k_norm" in norms else k).transpose(1, 2)
    cos, sin = (part.unsqueeze(1) for part in rope)
    half = attention.head_dim // 2
    k = k * cos + torch.cat([-k[..., half:], k[..., :half]], -1) * sin
    ends = tuple(at_rows(part, last) for part in rope)
    given = {memory_keyword(layer.__class__): _Given(k, v)}
    out = layer(at_rows(hidden, last), attention_mask=mask, position_embeddings=ends, **given)
    return out, k, v


def at_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return one row of each, `[B, P, D]` and int64 `[B]` to `[B, 1, D]`."""
    return values[torch.arange(len(values), device=values.device), rows][:, None]


def _continued(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], suffixes: Suffixes, keys: Tensor, values: Tensor
) -> Tensor:  # fmt: skip
    """One layer of completions, behind the keys and values of their prefixes."""
    out: Tensor = layer(hidden, position_embeddings=rope, behind=(suffixes, (keys, values)))
    return out


def _pass(through: Callable[..., _Out], layer: Any, recompute: bool, *inputs: Any) -> _Out:
    """Pass a layer; where activations are recomputed in the backward pass, they are not kept."""
    if recompute and torch.is_grad_enabled():
        draws = any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in layer.modules())
        done: _Out = checkpoint(through, layer, *inputs, use_reentrant=False, preserve_rng_state=draws)
        return done
    return through(layer, *inputs)


def padded_to(device: torch.device, dtype: torch.dtype) -> int:
    """Return the multiple of tokens that prefixes are padded to."""
    return _PLANNED if half_on_a_gpu(device, dtype) else 1


def read_prefixes(vlm: Any, prefixes: Sequence[Prefix], pad_id: int, recompute: bool) -> PrefixState:
    """Read every prefix once: pixels through the vision tower, tokens through the language model.

    Shorter prefixes are padded on the right, where causality alone hides the padding from what is real: no mask is
    needed, and so the fastest kernels serve.

    Args:
        vlm: a Qwen2.5-VL or Qwen3-VL of transformers, without its head.
        prefixes: B of them.
        pad_id: token that pads.
        recompute: keep no activations inside of layers (gradient checkpointing).
    """
    device, language = prefixes[0].token_ids.device, vlm.language_model
    multiple = padded_to(device, pass_dtype(language))
    lengths = [len(p.token_ids) for p in prefixes]
    ids, seen = pad_right([p.token_ids for p in prefixes], pad_id, multiple)
    positions = pad_right([p.positions.t() for p in prefixes], 0, multiple)[0].permute(2, 0, 1)
    even, last = min(lengths) == ids.shape[1], sent(torch.tensor(lengths) - 1, device)
    features = image_features(vlm, prefixes)
    hidden = language.embed_tokens(ids)
    pictured = (ids == vlm.config.image_token_id)[..., None]
    hidden = hidden.masked_scatter(pictured, torch.cat(features.pooler_output).to(hidden.dtype))
    # Qwen3-VL adds features of earlier vision layers behind its first layers (DeepStack); Qwen2.5-VL has none.
    deeper = [torch.cat(level) for level in features.get("deepstack_features") or ()]
    rope, keys, values = language.rotary_emb(hidden, positions), [], []
    for level, layer in enumerate(language.layers):
        # Of the last layer's rows, all but the one that predicts are but keys and values.
        if layer is language.layers[-1] and level >= len(deeper):
            mask = None if even else seen[:, None, None]
            hidden, k, v = _pass(_last_row, layer, recompute, hidden, rope, last, mask)
        else:
            hidden, k, v = _pass(_through, layer, recompute, hidden, rope)
        if level < len(deeper):
            added = torch.zeros_like(hidden).masked_scatter(pictured, deeper[level].to(hidden.dtype))
            hidden = hidden + added
        keys.append(k)
        values.append(v)
    hidden = hidden if len(deeper) < len(language.layers) else at_rows(hidden, last)
    return PrefixState(
        keys=keys, values=values, seen=seen, following=positions.amax((0, 2)) + 1,
        last_hidden=language.norm(hidden[:, 0]),
    )  # fmt: skip


def read_suffixes(vlm: Any, state: PrefixState, tokens: Tensor, real: Tensor, recompute: bool) -> Tensor:
    """Read the tokens of completions behind their prefixes.

    Completion token i sits at its prefix's largest position + 1 + i on all three rotary axes.

    Args:
        vlm: as in `read_prefixes`.
        state: the prefixes, read.
        tokens: int64 `[B*G, T]`.
        real: bool `[B*G, T]`; what is not costs nothing.
        recompute: keep no activations inside of layers.

    Returns:
        Hidden states `[B*G, T, D]`, zero where nothing is real.
    """
    language = vlm.language_model
    suffixes = laid_out(state.seen, real, pass_dtype(language))
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    positions = state.following.repeat_interleave(suffixes.group)[:, None] + steps
    hidden = language.embed_tokens(suffixes.pack(tokens))[None]
    if hidden.shape[1] == 0:
        return suffixes.unpack(hidden[0])
    rope = language.rotary_emb(hidden, suffixes.pack(positions).expand(3, 1, -1))
    for layer, keys, values in zip(language.layers, state.keys, state.values, strict=True):
        hidden = _pass(_continued, layer, recompute, hidden, rope, suffixes, keys, values)
    return suffixes.unpack(language.norm(hidden)[0])


def pad_right(rows: Sequence[Tensor], value: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return rows `[T_i, ...]` as one `[N, T, ...]`, padded on the right, and the bool mask `[N, T]` of what is real.

    Args:
        rows: of one dtype and device.
        value: of the padding.
        multiple: T is the longest row, rounded up to a multiple of this.
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    if short := -padded.shape[1] % multiple:
        more = padded.new_full((len(padded), short, *padded.shape[2:]), value)
        padded = torch.cat([padded, more], 1)
    lengths = sent(torch.tensor([len(row) for row in rows]), padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
