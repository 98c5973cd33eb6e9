"""Read each prefix once, and its group of completions behind the shared keys and values.

    prefix        p p p p p p p p p         once through tower and language model: keys and values [B, P]
    completions   `---------------- a a a       [B*G, T]; each attends to its prefix and to itself only
                  `---------------- b b b b b
                  `---------------- c c

The cost grows with P + G*T instead of G*(P + T). In training, the gradients of a group are summed in the
prefix's keys and values, and pass backward through the prefix once. On a CPU an update of the nano policy
takes 3.4 times less time than with one row per completion (benchmarks/shared_prefix.py). In sampling
(`decoder.py`) the prefix's keys and values are stored once.

The layers are those of transformers, with another attention function. The last layer is run only for the last
token of each prefix, except for its keys and values.
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
"""Output of a layer, its keys, its values."""
_Out = TypeVar("_Out")
_PLANNED = 32
"""In half precision on a GPU, prefixes are padded to a multiple of this: cuDNN makes a plan per length."""


class _Kept:
    """A substitute for transformers' cache that stores the keys and values of one layer."""

    def __init__(self) -> None:
        self.own: tuple[Tensor, Tensor]

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store and return a layer's keys and values, `[rows, K, T, d]` each; its attention calls this."""
        self.own = keys, values
        return keys, values


class _Given:
    """A substitute for transformers' cache that holds all keys and values that a layer attends to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.whole = keys, values

    def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return the keys and values given at construction, not the layer's; its attention calls this."""
        return self.whole


@cache
def memory_keyword(layer: type[nn.Module]) -> str:
    """Return the name of the cache argument of a class of layers: `cache` since transformers 5.24."""
    return "cache" if "cache" in signature(layer.forward).parameters else "past_key_values"


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    behind: tuple[Suffixes, tuple[Tensor, Tensor]] | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return the attention of prefixes or completions, with the signature that transformers' layers call.

    Args:
        module: the layer's attention; not used.
        query: `[rows, H, T, d]`.
        key: `[rows, K, S, d]`.
        value: `[rows, K, S, d]`.
        attention_mask: bool, broadcast to `[rows, 1, T, S]`. If None, attention is causal for T > 1, and a
            single query attends to all keys.
        scaling: factor of the scores.
        behind: for completions, their layout and the keys and values of their prefixes, `[B, K, P, d]` each.
            If None, the rows are prefixes.

    Returns:
        `[rows, T, H, d]`, and None in place of the attention weights.
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
    """Run one layer causally. There are no side effects, so checkpointing may run it again."""
    memory = _Kept()
    given = {memory_keyword(layer.__class__): memory}
    out = layer(hidden, attention_mask=None, position_embeddings=rope, **given)
    return out, *memory.own


def _last_row(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], last: Tensor, mask: Tensor | None
) -> _Passed:  # fmt: skip
    """Run one layer for the last token of each prefix; keys and values are computed for all tokens.

    Args:
        layer: of the language model.
        hidden: `[B, P, D]`.
        rope: cosines and sines of the rotary positions.
        last: int64 `[B]`, index of the last token.
        mask: attention mask, bool `[B, 1, 1, P]`; None if no prefix is padded.

    Returns:
        The output `[B, 1, D]`, and keys and values of all tokens.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    k, v = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape).transpose(1, 2)
    norms = dict(attention.named_children())  # Qwen3 normalises keys, Qwen2.5 does not
    k = (norms["k_norm"](k) if "k_norm" in norms else k).transpose(1, 2)
    cos, sin = (part.unsqueeze(1) for part in rope)
    half = attention.head_dim // 2
    k = k * cos + torch.cat([-k[..., half:], k[..., :half]], -1) * sin
    ends = tuple(at_rows(part, last) for part in rope)
    given = {memory_keyword(layer.__class__): _Given(k, v)}
    out = layer(at_rows(hidden, last), attention_mask=mask, position_embeddings=ends, **given)
    return out, k, v


def at_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return one row of each batch entry: `[B, 1, D]` for values `[B, P, D]` and rows int64 `[B]`."""
    return values[torch.arange(len(values), device=values.device), rows][:, None]


def _continued(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], suffixes: Suffixes, keys: Tensor, values: Tensor
) -> Tensor:  # fmt: skip
    """Run one layer for completions, behind the keys and values of their prefixes."""
    out: Tensor = layer(hidden, position_embeddings=rope, behind=(suffixes, (keys, values)))
    return out


def _pass(through: Callable[..., _Out], layer: Any, recompute: bool, *inputs: Any) -> _Out:
    """Run a layer by `through`; if `recompute`, with gradient checkpointing."""
    if recompute and torch.is_grad_enabled():
        draws = any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in layer.modules())
        done: _Out = checkpoint(through, layer, *inputs, use_reentrant=False, preserve_rng_state=draws)
        return done
    return through(layer, *inputs)


def padded_to(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of tokens to a multiple of which prefixes are padded."""
    return _PLANNED if half_on_a_gpu(device, dtype) else 1


def read_prefixes(vlm: Any, prefixes: Sequence[Prefix], pad_id: int, recompute: bool) -> PrefixState:
    """Read every prefix once: pixels through the vision tower, tokens through the language model.

    Shorter prefixes are padded on the right, where the causal mask alone hides the padding from real tokens.
    So only the last layer, which has one query per prefix, needs an attention mask, and the others use the
    fastest kernels.

    Args:
        vlm: a Qwen2.5-VL or Qwen3-VL of transformers, without its head.
        prefixes: B prefixes.
        pad_id: padding token.
        recompute: whether to use gradient checkpointing, layer by layer.
    """
    device, language = prefixes[0].token_ids.device, vlm.language_model
    multiple = padded_to(device, pass_dtype(language))
    lengths = [len(p.token_ids) for p in prefixes]
    ids, attention_mask = pad_right([p.token_ids for p in prefixes], pad_id, multiple)
    positions = pad_right([p.positions.t() for p in prefixes], 0, multiple)[0].permute(2, 0, 1)
    even, last = min(lengths) == ids.shape[1], sent(torch.tensor(lengths) - 1, device)
    features = image_features(vlm, prefixes)
    hidden = language.embed_tokens(ids)
    pictured = (ids == vlm.config.image_token_id)[..., None]
    hidden = hidden.masked_scatter(pictured, torch.cat(features.pooler_output).to(hidden.dtype))
    # Qwen3-VL adds features of earlier vision layers to the output of its first layers (DeepStack).
    deeper = [torch.cat(level) for level in features.get("deepstack_features") or ()]
    rope, keys, values = language.rotary_emb(hidden, positions), [], []
    for level, layer in enumerate(language.layers):
        # Of the last layer, only the last token's output is used; of the other tokens, only keys and values.
        # If DeepStack adds features behind the last layer, it is run for all tokens.
        if layer is language.layers[-1] and level >= len(deeper):
            mask = None if even else attention_mask[:, None, None]
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
        keys=keys, values=values, attention_mask=attention_mask, next_position=positions.amax((0, 2)) + 1,
        last_hidden=language.norm(hidden[:, 0]),
    )  # fmt: skip


def read_suffixes(vlm: Any, state: PrefixState, tokens: Tensor, real: Tensor, recompute: bool) -> Tensor:
    """Return the hidden states of completions that follow their prefixes.

    Completion token i has the rotary position (largest position of its prefix) + 1 + i on all three axes.

    Args:
        vlm: as in `read_prefixes`.
        state: of the prefixes, from `read_prefixes`.
        tokens: int64 `[B*G, T]`.
        real: bool `[B*G, T]`, false on padding, which is dropped before the layers.
        recompute: whether to use gradient checkpointing, layer by layer.

    Returns:
        Hidden states `[B*G, T, D]`, zero on padding.
    """
    language = vlm.language_model
    suffixes = laid_out(state.attention_mask, real, pass_dtype(language))
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    positions = state.next_position.repeat_interleave(suffixes.group)[:, None] + steps
    hidden = language.embed_tokens(suffixes.pack(tokens))[None]
    if hidden.shape[1] == 0:
        return suffixes.unpack(hidden[0])
    rope = language.rotary_emb(hidden, suffixes.pack(positions).expand(3, 1, -1))
    for layer, keys, values in zip(language.layers, state.keys, state.values, strict=True):
        hidden = _pass(_continued, layer, recompute, hidden, rope, suffixes, keys, values)
    return suffixes.unpack(language.norm(hidden)[0])


def pad_right(rows: Sequence[Tensor], value: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return rows `[T_i, ...]` padded on the right to `[N, T, ...]`, and a mask `[N, T]`, false on padding.

    Args:
        rows: N tensors of one dtype and device.
        value: of the padding.
        multiple: T is the longest row, rounded up to a multiple of this.
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    if short := -padded.shape[1] % multiple:
        more = padded.new_full((len(padded), short, *padded.shape[2:]), value)
        padded = torch.cat([padded, more], 1)
    lengths = sent(torch.tensor([len(row) for row in rows]), padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
