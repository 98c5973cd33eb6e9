"""A step on a GPU, recorded once and launched at once: sampling waits for launches, not for arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from segrl.models.kernels.first_use import FAILURES, first_line, give_up

_CLOSE = 0.02  # of a row's norm: kernels may be chosen anew while a step is recorded


class _Place:
    """Where steps are recorded on one GPU: a stream, and the memory that one recording leaves to the next."""

    def __init__(self, device: int) -> None:
        self.stream = torch.cuda.Stream(device)  # one: the libraries of products keep working memory for each
        self.pool = torch.cuda.graph_pool_handle()
        self.latest: torch.cuda.CUDAGraph | None = None
        """Holds the pool, which goes with the last graph that uses it, and whose handle is of no use then."""
        self.failed: list[torch.cuda.CUDAGraph] = []


_place = cache(_Place)


class _Graph(Protocol):
    """What can be launched again."""

    def replay(self) -> None:
        """Do what was recorded."""


class Recorder:
    """Calls a function of tokens `[N]` and a size as a CUDA graph, as long as shapes and the buffers it touches stay.

    The first call of a shape computes as ever, records, and replays what was recorded, which serves if it repeats the
    computed result. So the function must write the same to the same places when it is called twice.

    Args:
        required: raise where a step cannot be recorded, or is not repeated; otherwise say so once and compute all steps.
    """

    def __init__(self, required: bool) -> None:
        self.required = required
        self.gave_up = False
        self.shape: tuple[int, int] | None = None
        self.graph: _Graph | None = None
        self.tokens: Tensor
        self.result: Tensor

    def forget(self) -> None:
        """Forget the recording: buffers have been replaced."""
        self.shape = self.graph = None

    def call(self, function: Callable[[Tensor, int], Tensor], tokens: Tensor, size: int) -> Tensor:
        """Return what the function returns, of finite numbers; it is good until the next call.

        Args:
            function: the same at every call; touches nothing but tensors of the device, and waits for none.
            tokens: int64 `[N]`.
            size: decides shapes.

        Raises:
            ValueError: where recording is required and fails, or what was recorded does not repeat the result.
        """
        if self.shape == (len(tokens), size) and self.graph is not None:
            self.tokens.copy_(tokens)
            self.graph.replay()
            return self.result
        computed = function(tokens, size)
        if self.gave_up:
            return computed
        self.tokens = tokens.clone()
        try:
            self.graph, self.result = self._recorded(lambda: function(self.tokens, size))
            self.graph.replay()
        except FAILURES as error:
            self._fail(error)
            return computed
        near = (self.result - computed).norm(dim=-1) <= _CLOSE * computed.norm(dim=-1)
        if not bool((near | ~computed.isfinite().all(-1)).all()):
            self._fail("a recorded step does not repeat the computed one on this GPU")
            return computed
        self.shape = len(tokens), size
        return computed

    def _fail(self, reason: Exception | str) -> None:
        self.forget()
        if not self.required:
            self.gave_up = True
            give_up("rollout.graphs: sampling goes on without CUDA graphs", reason)
            return
        if isinstance(reason, torch.OutOfMemoryError):
            raise reason
        raise ValueError(
            f"rollout.graphs: must be auto or false where steps cannot be recorded; got true ({first_line(reason)})"
        )

    def _recorded(self, work: Callable[[], Tensor]) -> tuple[_Graph, Tensor]:
        """Return a CUDA graph and where it leaves its result.

        `torch.cuda.graph` would wait for the device and give its free memory back each time, and other streams are at work.
        """
        graph, place = torch.cuda.CUDAGraph(), _place(torch.cuda.current_device())
        place.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(place.stream):
            # The loader's thread pins memory meanwhile, which another mode would take for a fault.
            graph.capture_begin(pool=place.pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                place.failed.append(graph)  # the allocator may still ask it whose memory is whose
                with suppress(RuntimeError):  # what it says would stand in front of the cause
                    graph.capture_end()
                raise
            graph.capture_end()
        place.latest = graph
        torch.cuda.current_stream().wait_stream(place.stream)
        return graph, result
