"""The trivial case of `protocols.Sharding`: every rank holds everything."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class _Unsharded:
    """The answers of a strategy that shards nothing; torch's own functions do the work."""

    early_graphs = split_groups = partial_updates = True

    def whole_weights(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip gradients in place and return their norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


UNSHARDED = _Unsharded()
