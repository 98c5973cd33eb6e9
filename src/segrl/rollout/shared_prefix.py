"""Decoding in which every prefix is prefilled once and all completions of a step advance together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from segrl.models.hf_vlm import HFPolicy
from segrl.types import Completions, Prefix


class SharedPrefixEngine:
    """Samples all N = B*G completions in one decode.

    Args:
        max_tokens: a completion is cut off after this many.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def sample(
        self, policy: HFPolicy, prefixes: Sequence[Prefix], group_size: int, seeds: Sequence[int]
    ) -> Completions:
        """`group_size` completions of each prefix, from the policy's own distribution; groups contiguous.

        A completion is a function of its prefix and its own seed: neither its neighbours nor the number of ranks
        changes it.
        """
        rows = [np.random.default_rng(seed).random(self.max_tokens, np.float32) for seed in seeds]
        noise = torch.from_numpy(np.stack(rows)).to(prefixes[0].token_ids.device).double()

        def choose(log_distribution: Tensor, place: int) -> Tensor:
            """Where the cumulative distribution passes the noise; what has no probability is never there."""
            cumulative = log_distribution.exp().double().cumsum(-1)
            wanted = noise[:, place, None] * cumulative[:, -1:]
            return torch.searchsorted(cumulative, wanted, right=True)[:, 0]

        return self._decode(policy, prefixes, group_size, choose)

    def greedy(self, policy: HFPolicy, prefixes: Sequence[Prefix]) -> Completions:
        """The most likely token at each place, one completion per prefix."""
        return self._decode(policy, prefixes, 1, lambda log_distribution, _: log_distribution.argmax(-1))

    @torch.no_grad()
    def _decode(
        self,
        policy: HFPolicy,
        prefixes: Sequence[Prefix],
        group_size: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Completions:
        cache = policy.prefill(prefixes).repeated(group_size)
        hidden = cache.last_hidden
        columns: list[Tensor] = []
        running = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        alive: list[Tensor] = []
        while len(columns) < self.max_tokens and bool(running.any()):
            token = choose(policy.log_distribution(hidden), len(columns)).masked_fill(~running, policy.pad_id)
            columns.append(token)
            alive.append(running)
            running = running & ~torch.isin(token, policy.stop_ids)
            if len(columns) < self.max_tokens:
                hidden = policy.extend(cache, token[:, None])[:, 0]
        tokens, mask = torch.stack(columns, 1), torch.stack(alive, 1)
        return Completions(
            tokens=tokens, mask=mask, texts=policy.encoder.decode(tokens, mask), finished=~running
        )
