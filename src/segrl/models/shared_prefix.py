"""One prefix and its group of suffixes: what is read once and shared.

A prefix is prefilled once; its keys and values then serve all completions of the group, in decoding and in the
training pass, where gradients of the whole group flow back into the one prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(slots=True, kw_only=True)
class PrefixCache:
    """Keys and values of prefixes; grows as suffixes are read."""

    keys_values: DynamicCache
    seen: Tensor
    """int64 `[rows, P + T]`, 0 on left padding."""
    following: Tensor
    """int64 `[rows]`, rotary position of the first suffix token: images advance it by their side, not their area."""
    last_hidden: Tensor
    """`[rows, D]`, hidden state that predicts the first suffix token."""
    prefix_length: int = -1

    def __post_init__(self) -> None:
        if self.prefix_length < 0:
            self.prefix_length = self.seen.shape[1]

    def repeated(self, group_size: int) -> PrefixCache:
        """One row per completion; groups contiguous. The keys and values are repeated in place."""
        self.keys_values.batch_repeat_interleave(group_size)
        return PrefixCache(
            keys_values=self.keys_values,
            seen=self.seen.repeat_interleave(group_size, 0),
            following=self.following.repeat_interleave(group_size, 0),
            last_hidden=self.last_hidden.repeat_interleave(group_size, 0),
            prefix_length=self.prefix_length,
        )


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
