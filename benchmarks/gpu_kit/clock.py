"""Measure seconds and memory of the parts of a step, and the kernels of one part."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from gpu_kit.findings import Findings


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Return the median milliseconds of a call, two calls to warm up left out; on a CPU those of one call."""
    for _ in range(2):
        work()
    wait(device)
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)
    ]
    for before, after in pairs:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


class Clock:
    """Measures the seconds of nested parts, and the peak memory of the outermost part.

    The device is idle at the beginning and at the end of each part.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stack = device, list[str]()
        self.seconds, self.peaks = defaultdict[str, float](float), dict[str, float]()
        self.profiler: Any = None
        self.profiled = ""
        """Part that is profiled the next time it runs, once."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part, or a part of one."""
        outermost = not self.stack
        self.stack.append(name)
        path = "/".join(self.stack)
        wait(self.device)
        if outermost and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            with self._profile(name):
                yield
                wait(self.device)
        finally:
            self.seconds[path] += time.perf_counter() - began
            self.stack.pop()
            if outermost and self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 1e9
                self.peaks[name] = max(self.peaks.get(name, 0.0), peak)

    def _profile(self, name: str) -> Any:
        if name != self.profiled:
            return nullcontext()
        self.profiled = ""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *kinds])
        return self.profiler

    def around(self, owner: Any, method: str, name: str) -> None:
        """Time every call of a method of an object as a part."""
        plain = getattr(owner, method)

        def timed(*given: Any, **keys: Any) -> Any:
            with self.part(name):
                return plain(*given, **keys)

        object.__setattr__(owner, method, timed)

    def taken(self) -> dict[str, float]:
        """Return seconds by part since the last call."""
        seconds = {path: round(value, 4) for path, value in self.seconds.items()}
        self.seconds.clear()
        return seconds


def say_kernels(findings: Findings, profiler: Any, device: torch.device, name: str, rows: int = 25) -> None:
    """Write down the kernels that took longest, and how long the device was busy in all."""
    taken, times, spans = Counter[str](), Counter[str](), list[tuple[int, int]]()
    for event in profiler.profiler.kineto_results.events():
        on_device = "CUDA" in str(event.device_type())
        of_the_host = event.name().startswith(("Optimizer.", "ProfilerStep", "aten::"))
        if on_device != (device.type == "cuda") or (on_device and of_the_host):
            continue
        taken[event.name()] += event.duration_ns() / 1e6
        times[event.name()] += 1
        if on_device:
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    spans.sort()
    busy = end = 0
    for start, stop in spans:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    whole = round((end - spans[0][0]) / 1e6, 2) if spans else None
    findings.say(name=name, kernels=sum(times.values()), busy_ms=round(busy / 1e6, 2), span_ms=whole)
    for kernel, value in taken.most_common(rows):
        findings.say(name=name, kernel=kernel[:160], ms=round(value, 3), times=times[kernel])
