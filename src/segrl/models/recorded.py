"""A step on a GPU, recorded once and launched at once: sampling waits for launches, not for arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CLOSE = 0.05  # of the largest value: kernels may be chosen anew while a step is recorded


class Recorder:
    """Calls a function of tokens `[N]` and a size as a CUDA graph, as long as shapes and the buffers it touches stay.

    The first call of a shape computes as ever, records, and replays what was recorded: only what repeats the
    computed result is believed. So the function must write the same to the same places when it is called twice.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.shape: tuple[int, int] | None = None
        self.graph: torch.cuda.CUDAGraph
        self.tokens: Tensor
        self.result: Tensor

    def forget(self) -> None:
        """Buffers have been replaced."""
        self.shape = None

    def call(self, function: Callable[[Tensor, int], Tensor], tokens: Tensor, size: int) -> Tensor:
        """As the function; the result is good until the next call.

        Args:
            function: the same at every call; touches nothing but tensors of the device.
            tokens: int64 `[N]`.
            size: decides shapes.

        Raises:
            ValueError: if what was recorded does not repeat the result.
        """
        if self.shape == (len(tokens), size):
            self.tokens.copy_(tokens)
            self.graph.replay()
            return self.result
        computed = function(tokens, size)
        self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: the loader's pins memory.
        with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
            self.result = function(self.tokens, size)
        self.graph.replay()
        if not (self.result - computed).abs().max() <= _CLOSE * computed.abs().max():
            raise ValueError(
                "rollout.graphs: a recorded step does not repeat the computed one on this GPU; false samples without"
            )
        self.shape = len(tokens), size
        return computed
