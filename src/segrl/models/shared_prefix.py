"""One prefix and its group of completions: the prefix is read once, and shared.

    prefix        p p p p p p p p p         vision tower and language model once: keys and values of every layer, [B, P]
    completions   `---------------- a a a       each sees its prefix and itself, and none of its neighbours, [B*G, T]
                  `---------------- b b b b b
                  `---------------- c c

Cost grows with P + G*T, not with G*(P + T). In training the gradients of the whole group add up in the prefix's keys
and values and flow back through it once. In sampling (`decoder.py`) the prefix's keys and values are stored once.

The layers are transformers' own; what they attend to is given from here, and of a prefix's last layer only the row that predicts is
gone through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segrl.models.suffixes import Suffixes, grouped_product, laid_out
from segrl.types import Prefix, PrefixState

_Passed = tuple[Tensor, Tensor, Tensor]
"""Hidden states behind a layer, its keys, its values."""
_Out = TypeVar("_Out")


class _Memory:
    """Stands where transformers' layers keep a cache: puts earlier keys and values in front of a layer's own, which it tells."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.before = None if keys is None or values is None else (keys, values)
        self.own: tuple[Tensor, Tensor]

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Called by the attention of a layer with `[rows, K, T, d]`; what it is to attend to."""
        self.own = keys, values
        if self.before is None:
            return keys, values
        return torch.cat([self.before[0], keys], 2), torch.cat([self.before[1], values], 2)


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
        attention_mask: bool, broadcast to `[rows, 1, T, S]`; none is causal.
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


def _through(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, keys: Tensor | None, values: Tensor | None
) -> _Passed:  # fmt: skip
    """One layer: the hidden states behind it, its own keys and values. Without side effects, so that it may run twice."""
    memory = _Memory(keys, values)
    out = layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=memory)
    return out, *memory.own


def _last_row(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, *_: None
) -> _Passed:  # fmt: skip
    """As `_through` without a prefix, but hidden states of the last row alone."""
    attention, before = layer.self_attn, slice(None, -1)
    normed = layer.input_layernorm(hidden[:, before])
    shape = (*normed.shape[:2], -1, attention.head_dim)
    k, v = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape).transpose(1, 2)
    norms = dict(attention.named_children())  # Qwen3 norms keys, Qwen2.5 does not
    k = (norms["k_norm"](k) if "k_norm" in norms else k).transpose(1, 2)
    cos, sin = (part[:, before].unsqueeze(1) for part in rope)
    half = attention.head_dim // 2
    k = k * cos + torch.cat([-k[..., half:], k[..., :half]], -1) * sin
    ends = rope[0][:, -1:], rope[1][:, -1:]
    out, own_k, own_v = _through(
        layer, hidden[:, -1:], ends, None if mask is None else mask[..., -1:, :], k, v
    )
    return out, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)


def _continued(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], suffixes: Suffixes, keys: Tensor, values: Tensor
) -> Tensor:  # fmt: skip
    """One layer of completions, behind the keys and values of their prefixes."""
    out: Tensor = layer(hidden, position_embeddings=rope, behind=(suffixes, (keys, values)))
    return out


def _pass(through: Callable[..., _Out], layer: Any, recompute: bool, *inputs: Any) -> _Out:
    """A layer; where activations are recomputed in the backward pass, they are not kept."""
    if recompute and torch.is_grad_enabled():
        done: _Out = checkpoint(through, layer, *inputs, use_reentrant=False)
        return done
    return through(layer, *inputs)


def read_prefixes(vlm: Any, prefixes: Sequence[Prefix], pad_id: int, recompute: bool) -> PrefixState:
    """Read every prefix once: pixels through the vision tower, tokens through the language model.

    Args:
        vlm: a Qwen2.5-VL or Qwen3-VL of transformers, without its head.
        prefixes: B of them; shorter ones are padded on the left.
        pad_id: token that pads.
        recompute: keep no activations inside of layers (gradient checkpointing).
    """
    ids = pad_left([p.token_ids for p in prefixes], pad_id)
    kinds = pad_left([p.token_types for p in prefixes], 0)
    seen = pad_left([torch.ones_like(p.token_ids) for p in prefixes], 0)
    grid = torch.cat([p.grid for p in prefixes])
    positions, _ = vlm.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=seen)
    language = vlm.language_model
    pixels = torch.cat([p.pixels for p in prefixes]).to(vlm.visual.dtype)
    features = vlm.get_image_features(pixels, grid, return_dict=True)
    hidden = language.embed_tokens(ids)
    pictured = (ids == vlm.config.image_token_id)[..., None]
    hidden = hidden.masked_scatter(pictured, torch.cat(features.pooler_output).to(hidden.dtype))
    # Qwen3-VL adds features of earlier vision layers behind its first layers (DeepStack); Qwen2.5-VL has none.
    deeper = [torch.cat(level) for level in features.get("deepstack_features") or ()]
    mask = None  # transformers' word for plainly causal
    if not bool(seen.all()):
        square = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        itself = square & square.t()  # padding, too, sees something
        mask = square & seen.bool()[:, None, None] | itself
    rope, keys, values = language.rotary_emb(hidden, positions), [], []
    for level, layer in enumerate(language.layers):
        # Of the last layer's rows, all but the one that predicts are but keys and values.
        through = _last_row if layer is language.layers[-1] and level >= len(deeper) else _through
        hidden, k, v = _pass(through, layer, recompute, hidden, rope, mask, None, None)
        if level < len(deeper):
            hidden = hidden + torch.zeros_like(hidden).masked_scatter(
                pictured, deeper[level].to(hidden.dtype)
            )
        keys.append(k)
        values.append(v)
    following = positions.masked_fill(seen == 0, 0).amax((0, 2)) + 1
    return PrefixState(
        keys=keys, values=values, seen=seen.bool(), following=following,
        last_hidden=language.norm(hidden[:, -1]),
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
    half = torch.is_autocast_enabled(tokens.device.type)
    dtype = torch.get_autocast_dtype(tokens.device.type) if half else language.norm.weight.dtype
    suffixes = laid_out(state.seen, real, dtype)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    positions = state.following.repeat_interleave(suffixes.group)[:, None] + steps
    hidden = language.embed_tokens(suffixes.pack(tokens))[None]
    if hidden.shape[1] == 0:
        return suffixes.unpack(hidden[0])
    rope = language.rotary_emb(hidden, suffixes.pack(positions).expand(3, 1, -1))
    for layer, keys, values in zip(language.layers, state.keys, state.values, strict=True):
        hidden = _pass(_continued, layer, recompute, hidden, rope, suffixes, keys, values)
    return suffixes.unpack(language.norm(hidden)[0])


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """1-D int64 rows to `[B, longest]`, padded on the left."""
    longest = max(len(row) for row in rows)
    padded = rows[0].new_full((len(rows), longest), value)
    for i, row in enumerate(rows):
        padded[i, longest - len(row) :] = row
    return padded


def pad_right(rows: Sequence[Tensor], value: int) -> tuple[Tensor, Tensor]:
    """1-D int64 rows to `[N, longest]` padded on the right, and the bool mask of what is real."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
