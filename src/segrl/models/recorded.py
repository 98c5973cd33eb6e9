"""A step on a GPU, recorded once and launched at once: sampling waits for launches, not for arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

_CLOSE = 0.02  # of a row's norm: kernels may be chosen anew while a step is recorded


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings: the libraries of products keep working memory for each."""
    return torch.cuda.Stream(device)


class _Graph(Protocol):
    """What can be launched again."""

    def replay(self) -> None:
        """Do what was recorded."""


class Recorder:
    """Calls a function of tokens `[N]` and a size as a CUDA graph, as long as shapes and the buffers it touches stay.

    The first call of a shape computes as ever, records, and replays what was recorded: only what repeats the
    computed result is believed. So the function must write the same to the same places when it is called twice.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.graph: _Graph
        self.tokens: Tensor
        self.result: Tensor

    def forget(self) -> None:
        """Buffers have been replaced."""
        self.shape = None

    def call(self, function: Callable[[Tensor, int], Tensor], tokens: Tensor, size: int) -> Tensor:
        """As the function, of finite numbers; the result is good until the next call.

        Args:
            function: the same at every call; touches nothing but tensors of the device, and waits for none.
            tokens: int64 `[N]`.
            size: decides shapes.

        Raises:
            ValueError: if the function cannot be recorded, or what was recorded does not repeat the result.
        """
        if self.shape == (len(tokens), size):
            self.tokens.copy_(tokens)
            self.graph.replay()
            return self.result
        computed, self.tokens = function(tokens, size), tokens.clone()
        try:
            self.graph, self.result = self._recorded(lambda: function(self.tokens, size))
        except RuntimeError as error:  # CUDA's word for what cannot be recorded
            raise ValueError(
                f"rollout.graphs: a step cannot be recorded on this GPU; false samples without: {str(error).splitlines()[0]}"
            ) from error
        self.graph.replay()
        off = (self.result - computed).norm(dim=-1) > _CLOSE * computed.norm(dim=-1)
        if bool((off & computed.isfinite().all(-1)).any()):
            raise ValueError(
                "rollout.graphs: a recorded step does not repeat the computed one on this GPU; false samples without"
            )
        self.shape = len(tokens), size
        return computed

    def _recorded(self, work: Callable[[], Tensor]) -> tuple[_Graph, Tensor]:
        """A CUDA graph with memory of its own, and where it leaves its result.

        `torch.cuda.graph` would wait for the device and give its free memory back each time, and other streams are at work.
        """
        graph, stream = torch.cuda.CUDAGraph(), _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(
                capture_error_mode="thread_local"
            )  # the loader's thread pins memory meanwhile
            try:
                result = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, result
