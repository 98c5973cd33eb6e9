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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segrl.types import Prefix, PrefixState

_Passed = tuple[Tensor, Tensor, Tensor]
"""Hidden states behind a layer, its keys, its values."""


class _Memory:
    """Stands where transformers' layers keep a cache: puts a prefix in front of a layer's own keys and values."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.before = None if keys is None or values is None else (keys, values)
        self.own: tuple[Tensor, Tensor]

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        """Called by the attention of a layer with `[rows, K, T, d]`; what it is to attend to."""
        self.own = keys, values
        if self.before is None:
            return keys, values
        return _behind(self.before[0], keys), _behind(self.before[1], values)


def _behind(prefix: Tensor, own: Tensor) -> Tensor:
    """`[B, K, P, d]` and `[B*G, K, T, d]` to `[B*G, K, P+T, d]`."""
    group = len(own) // len(prefix)
    shared = prefix[:, None].expand(-1, group, -1, -1, -1).flatten(0, 1)
    return torch.cat([shared.to(own.dtype), own], 2)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in which the heads that share keys and values are rows of one product, so that neither is repeated.

    Args:
        module: the layer's attention; not looked at.
        query: `[rows, H, T, d]`.
        key: `[rows, K, S, d]`.
        value: `[rows, K, S, d]`.
        attention_mask: bool, broadcast to `[rows, 1, T, S]`; none is causal.
        scaling: of the products.

    Returns:
        `[rows, T, H, d]`, as transformers' attention functions do.
    """
    rows, heads, length, width = query.shape
    shared = heads // key.shape[1]
    if attention_mask is None and length > 1:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=shared > 1
        )
        return out.transpose(1, 2).contiguous(), None
    mask = (
        None if attention_mask is None else attention_mask.expand(-1, -1, length, -1).repeat(1, 1, shared, 1)
    )
    grouped = query.reshape(rows, key.shape[1], shared * length, width)
    out = nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return out.view(rows, heads, length, width).transpose(1, 2).contiguous(), None


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


def _pass(through: Callable[..., _Passed], layer: Any, recompute: bool, *inputs: Any) -> _Passed:
    """A layer; where activations are recomputed in the backward pass, they are not kept."""
    if recompute and torch.is_grad_enabled():
        done: _Passed = checkpoint(through, layer, *inputs, use_reentrant=False)
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


def read_suffixes(vlm: Any, state: PrefixState, tokens: Tensor, recompute: bool) -> Tensor:
    """Read the tokens `[B*G, T]` of completions behind their prefixes; hidden states `[B*G, T, D]`.

    Completion token i sits at its prefix's largest position + 1 + i on all three rotary axes.
    """
    language, (rows, length) = vlm.language_model, tokens.shape
    group = rows // len(state.seen)
    steps = torch.arange(length, device=tokens.device)
    positions = (state.following.repeat_interleave(group)[:, None] + steps).expand(3, -1, -1)
    hidden = language.embed_tokens(tokens)
    own = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    # One mask for all where no prefix is padded.
    seen = state.seen[:1] if bool(state.seen.all()) else state.seen.repeat_interleave(group, 0)
    mask = torch.cat(
        [seen[:, None, None].expand(-1, 1, length, -1), own.expand(len(seen), 1, length, length)], -1
    )
    rope = language.rotary_emb(hidden, positions)
    for layer, keys, values in zip(language.layers, state.keys, state.values, strict=True):
        hidden, _, _ = _pass(_through, layer, recompute, hidden, rope, mask, keys, values)
    out: Tensor = language.norm(hidden)
    return out


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
