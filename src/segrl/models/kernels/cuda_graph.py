"""Capture a decoding step as a CUDA graph and replay it, so that its kernels are launched at once.

Launching the kernels of a step one by one takes longer than their work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from segrl.models.kernels.first_use import FAILURES, first_line, give_up

_CLOSE = 0.02  # share of a row's norm: a capture may select other kernels than the eager step


class _Place:
    """The stream and the memory pool that all captures on one GPU share."""

    def __init__(self, device: int) -> None:
        self.stream = torch.cuda.Stream(device)  # only one: cuBLAS keeps a workspace per stream
        self.pool = torch.cuda.graph_pool_handle()
        self.latest: torch.cuda.CUDAGraph | None = None
        """Keeps the pool alive, which is freed with the last graph that uses it."""
        self.failed: list[torch.cuda.CUDAGraph] = []


_place = cache(_Place)


class _Graph(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Launch the captured kernels."""


class GraphRecorder:
    """Calls a function of tokens `[N]` and a size through a CUDA graph.

    The first call with a new shape runs the function eagerly, captures it, replays the graph once and
    compares the results (2 % of each row's norm). Later calls with that shape replay the graph. So the
    function must be idempotent: two calls write the same values to the same buffers. `forget` must be called
    when its buffers are replaced.

    Args:
        required: if True, raise where a step cannot be captured or its replay differs. If False, warn and run
            all further steps eagerly.
    """

    def __init__(self, required: bool) -> None:
        self.required = required
        self.gave_up = False
        self.shape: tuple[int, int] | None = None
        self.graph: _Graph | None = None
        self.tokens: Tensor
        self.result: Tensor

    def forget(self) -> None:
        """Drop the captured graph, because buffers that it uses have been replaced."""
        self.shape = self.graph = None

    def call(self, function: Callable[[Tensor, int], Tensor], tokens: Tensor, size: int) -> Tensor:
        """Return `function(tokens, size)`; the tensor is valid until the next call.

        Rows of the eager result that are not finite are not compared with the replay.

        Args:
            function: the same at every call; it uses tensors of the device only and never synchronises with
                the host.
            tokens: int64 `[N]`.
            size: determines the shapes inside the function.

        Raises:
            ValueError: if capture is required and fails, or the replay differs from the eager result.
            torch.OutOfMemoryError: if capture is required and memory runs out.
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
            "rollout.graphs: must be auto or false where steps cannot be recorded; "
            f"got true ({first_line(reason)})"
        )

    def _recorded(self, work: Callable[[], Tensor]) -> tuple[_Graph, Tensor]:
        """Return a CUDA graph and the tensor that it writes its result to.

        `torch.cuda.graph` is not used: at each capture it synchronises with the device, where other streams
        are at work, and empties the allocator's cache.
        """
        graph, place = torch.cuda.CUDAGraph(), _place(torch.cuda.current_device())
        place.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(place.stream):
            # The loader's thread may pin memory meanwhile, which the mode "global" forbids.
            graph.capture_begin(pool=place.pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                place.failed.append(graph)  # the allocator may still refer to it
                with suppress(RuntimeError):  # its error would hide the cause
                    graph.capture_end()
                raise
            graph.capture_end()
        place.latest = graph
        torch.cuda.current_stream().wait_stream(place.stream)
        return graph, result
