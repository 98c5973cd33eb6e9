"""Sample completions: each prefix is read once, and all completions are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segrl.models.kernels.cuda_graph import GraphRecorder
from segrl.protocols import DecodablePolicy
from segrl.types import Completions, Prefix, PrefixState

_STRIDE = 128  # steps that one captured graph serves; it reads masked keys up to the next multiple
_BLOCK = 128  # tokens; divides the vocabularies of Qwen's policies
_Choose = Callable[[Tensor, int, Tensor], Tensor]
"""Maps logits `[R, V]`, the place in the completions, and indices of completions `[R]` to tokens `[R]`."""


class SharedPrefixEngine:
    """Samples all N = B*G completions in one decode, from which finished completions are removed.

    Args:
        max_tokens: a completion is cut off after this many.
        graphs: whether decoding steps are captured as a CUDA graph on a GPU. If capture fails, "auto" runs
            them eagerly, with a warning, and True raises ValueError.
        prefixes_at_once: prefixes whose completions are decoded together; fewer take less memory and more
            time. None: all. Ignored if `state` is given, which holds all prefixes.
    """

    def __init__(
        self, max_tokens: int, graphs: bool | Literal["auto"] = "auto", prefixes_at_once: int | None = None
    ) -> None:
        self.max_tokens, self.graphs, self.prefixes_at_once = max_tokens, graphs, prefixes_at_once
        self.recorder = GraphRecorder(required=graphs is True)

    def sample(
        self, policy: DecodablePolicy, prefixes: Sequence[Prefix], group_size: int, seeds: Sequence[int],
        state: PrefixState | None = None,
    ) -> Completions:  # fmt: skip
        """Sample `group_size` completions of each prefix from the policy's distribution; groups contiguous.

        For given weights, a completion is a function of its prefix and its own seed. It depends neither on
        the other completions nor on the number of ranks.
        """
        rows = [np.random.default_rng(seed).random(self.max_tokens, np.float32) for seed in seeds]
        noise = torch.from_numpy(np.stack(rows)).to(prefixes[0].token_ids.device).double()

        def choose(logits: Tensor, place: int, which: Tensor) -> Tensor:
            """Sample with each completion's noise for this place."""
            return sample_tokens(logits.softmax(-1), noise[which, place])

        return self._in_parts(policy, prefixes, group_size, choose, state)

    def greedy(self, policy: DecodablePolicy, prefixes: Sequence[Prefix]) -> Completions:
        """Decode one completion per prefix, with the most likely token at each place."""
        return self._in_parts(policy, prefixes, 1, lambda logits, *_: logits.argmax(-1), None)

    def _in_parts(
        self,
        policy: DecodablePolicy,
        prefixes: Sequence[Prefix],
        group_size: int,
        choose: _Choose,
        state: PrefixState | None,
    ) -> Completions:
        """Decode `prefixes_at_once` prefixes at a time, or all together if `state` is given."""
        size = len(prefixes) if state is not None else self.prefixes_at_once or len(prefixes)
        parts = [
            self._decode(
                policy, prefixes[first : first + size], group_size, choose, state, first * group_size
            )
            for first in range(0, len(prefixes), size)
        ]
        return parts[0] if len(parts) == 1 else Completions.joined(parts)

    def _recorder_on(self, device: torch.device) -> GraphRecorder | None:
        """Return the recorder of decoding steps, or None to run each step eagerly."""
        return self.recorder if self.graphs and device.type == "cuda" and not self.recorder.gave_up else None

    @torch.no_grad()
    def _decode(
        self,
        policy: DecodablePolicy,
        prefixes: Sequence[Prefix],
        group_size: int,
        choose: _Choose,
        state: PrefixState | None,
        first: int,
    ) -> Completions:
        """Decode one part; `first` is the index of its first completion among all completions."""
        state = state or policy.prefill(prefixes)
        self.recorder.forget()  # an interrupted decode may have left a graph of freed buffers
        recorder = self._recorder_on(policy.device)
        stride = None if recorder is None else _STRIDE
        decoder = policy.decoder(state, group_size, self.max_tokens, stride, recorder)
        head = policy.head()
        hidden = state.last_hidden.repeat_interleave(group_size, 0)
        del state  # the decoder has copies
        which = torch.arange(len(hidden), device=hidden.device)
        written = torch.full((len(hidden), self.max_tokens), policy.pad_id, device=hidden.device)
        running = torch.ones_like(which, dtype=torch.bool)
        look = 1 if hidden.device.type == "cpu" else 8  # on a GPU, each look synchronises with the host
        for place in range(self.max_tokens):
            token = choose(policy.logits(hidden, head), place, which + first).masked_fill(
                ~running, policy.pad_id
            )
            written[which, place] = token
            running = running & ~torch.isin(token, policy.stop_ids)
            if place + 1 == self.max_tokens:
                break
            if (place + 1) % look == 0 and (left := int(running.sum())) < len(running):
                if left == 0:
                    break
                room = running.view(decoder.groups, decoder.group)
                if (staying := _staying(room, 0.75 if stride is None else 0.5)) is not None:
                    groups, places = staying
                    rows = (groups[:, None] * decoder.group + places).flatten()
                    decoder.keep(groups, places)
                    token, running, which = token[rows], running[rows], which[rows]
            hidden = decoder.step(token)
        self.recorder.forget()  # the next decode has other weights and buffers
        return _until_stop(policy, written)


def sample_tokens(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Return one token per row, int64 `[R]`, by inverse transform sampling.

    A token is the first whose cumulative probability exceeds the noise, so tokens of probability zero are
    never sampled. The search selects a block first and then a token in it, because a GPU is slow at
    cumulative sums over a whole vocabulary.

    Args:
        probabilities: float32 `[R, V]`.
        noise: float64 `[R]`, in [0, 1).
    """
    short = -probabilities.shape[-1] % _BLOCK
    blocks = (F.pad(probabilities, (0, short)) if short else probabilities).unflatten(-1, (-1, _BLOCK))
    until = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    wanted = noise[:, None] * until[:, -1:]
    block = torch.searchsorted(until, wanted, right=True)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    total = inside[:, -1:]
    wanted = wanted - until.gather(1, block) + total
    wanted = wanted.clamp_min(0).minimum(total * (1 - 2**-52))  # stay inside the block despite rounding
    return block[:, 0] * _BLOCK + torch.searchsorted(inside, wanted, right=True)[:, 0]


def _staying(running: Tensor, share: float) -> tuple[Tensor, Tensor] | None:
    """Return the groups `[B']` to keep and the completions `[B', G']` to keep in each, or None to keep all.

    All groups keep the same number of rows, so some finished rows may stay. Removing rows makes a captured
    graph invalid, so rows are removed only if at most `share` of them would remain.

    Args:
        running: bool `[B, G]`, true on unfinished completions.
        share: largest share of the rows that may remain.
    """
    alive = running.sum(1)
    groups, most = alive.nonzero()[:, 0], int(alive.max())
    if len(groups) * most > share * running.numel():
        return None
    return groups, running[groups].int().argsort(dim=1, descending=True, stable=True)[:, :most]


def _until_stop(policy: DecodablePolicy, written: Tensor) -> Completions:
    """Return completions from token rows `[N, T]`: each ends with its first stop token, if it has one."""
    stops = torch.isin(written, policy.stop_ids)
    mask = stops.cumsum(1) - stops.long() == 0
    longest = int(mask.sum(1).max())
    tokens, mask = written[:, :longest], mask[:, :longest]
    return Completions(
        tokens=tokens, mask=mask, texts=policy.encoder.decode(tokens, mask), finished=stops.any(1)
    )
