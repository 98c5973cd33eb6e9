"""GRPO updates of a random policy of 3B's shape by segrl's own stage.

Findings: seconds of every part, memory, kernels, and the distance from the floor.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import floor
import lightning
import noise
import tiny_vlm
import torch

from gpu_kit.clock import Clock, say_kernels, wait
from gpu_kit.findings import Findings
from segrl.models.kernels.cuda_graph import GraphRecorder
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.stages.grpo import GRPOStage

PLAN = (
    *["graphs"] * 4, "profile learning", "profile sampling", *["no graphs"] * 2, *["activations kept"] * 2,
)  # fmt: skip
REHEARSED = tuple(dict.fromkeys(PLAN))
PROFILED = {"profile sampling": "sample", "profile learning": "learn"}


class TimedStage(GRPOStage):
    """A stage whose parts are timed.

    Where memory runs out, it tries once more with half the groups in a pass.
    """

    clock: Clock
    findings: Findings
    plan: tuple[str, ...]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Make an update, in fewer groups a pass where memory runs out."""
        while True:
            try:
                super().training_step(batch, batch_idx)
                return
            except torch.OutOfMemoryError as error:
                reason = str(error)[:300]
            self.clock.stack.clear()
            self.zero_grad()
            torch.cuda.empty_cache()
            self.findings.say(
                name="out of memory",
                kind=self.plan[batch_idx],
                groups_in_a_pass=self.loop.micro_batch_size,
                error=reason,
            )
            if self.loop.micro_batch_size == 1:
                raise MemoryError("a pass of one group must fit the memory of the GPU, and does not")
            self.loop = replace(self.loop, micro_batch_size=self.loop.micro_batch_size // 2)

    def forward(self, part: Any, weights: Any) -> Any:
        """Time it."""
        with self.clock.part("forward"):
            return super().forward(part, weights)

    def backward_part(self, loss: Any, last: bool) -> None:
        """Time it."""
        with self.clock.part("backward"):
            super().backward_part(loss, last)

    def update(self, minibatch: Any) -> Any:
        """Time it."""
        with self.clock.part("learn"):
            return super().update(minibatch)

    def tame_gradients(self) -> Any:
        """Time it."""
        with self.clock.part("clip"):
            return super().tame_gradients()

    def rollout(self, *given: Any, **keys: Any) -> Any:
        """Time it."""
        with self.clock.part("rollout"):
            return super().rollout(*given, **keys)


class Turns(lightning.Callback):
    """Sets what each step is to be, and says what it took.

    Args:
        findings: of the part.
        clock: of the stage.
        plan: kinds of the steps.
        tokens: of a completion.
        seconds: begins no other step after so many.
    """

    def __init__(
        self, findings: Findings, clock: Clock, plan: tuple[str, ...], tokens: int, seconds: float
    ) -> None:
        self.findings, self.clock, self.plan, self.tokens, self.seconds = (
            findings,
            clock,
            plan,
            tokens,
            seconds,
        )
        self.lines, self.recorded = list[dict[str, Any]](), list[float]()
        self.began = self.ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, stage: Any, batch: Any, batch_idx: int) -> None:
        """Prepare a step of its kind."""
        kind = self.plan[batch_idx]
        stage.engine.graphs = "auto" if kind != "no graphs" else False
        stage.engine.max_tokens = min(16, self.tokens) if kind == "profile sampling" else self.tokens
        self.clock.profiled = PROFILED.get(kind, "")
        if kind == "activations kept" and self.plan[batch_idx - 1] != kind:
            stage.policy.gradient_checkpointing = False
            stage.policy.model.model.visual.gradient_checkpointing_disable()
            fitting = min(stage.loop.micro_batch_size, _groups_that_fit(self.clock.device))
            stage.loop = replace(stage.loop, micro_batch_size=fitting)
        self.recorded.clear()
        self.clock.taken()
        self.clock.peaks.clear()
        wait(self.clock.device)
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Say what it took."""
        wait(self.clock.device)
        kind, whole, parts = self.plan[batch_idx], time.perf_counter() - self.began, self.clock.taken()
        inner = sum(parts.get(f"learn/{name}", 0.0) for name in ("forward", "backward", "clip"))
        parts["learn/optimizer"] = round(parts.get("learn", 0.0) - inner, 4)
        if self.clock.profiler is not None:
            self._say_profile(kind)
        line = {
            "kind": kind, "first_of_its_kind": batch_idx == 0 or self.plan[batch_idx - 1] != kind,
            "step_s": round(whole, 4), "waited_s": round(self.began - self.ended, 4) if batch_idx else 0.0,
            "parts_s": parts, "groups_in_a_pass": stage.loop.micro_batch_size,
            "recorded": [round(s, 4) for s in self.recorded], "loss": stage.latest.get("policy/loss"),
            "grad_norm": stage.latest.get("policy/grad_norm"),
        }  # fmt: skip
        if self.clock.device.type == "cuda":
            line["peaks_gb"] = {name: round(value, 2) for name, value in self.clock.peaks.items()}
            line["reserved_gb"] = round(torch.cuda.memory_reserved() / 1e9, 2)
        self.lines.append(line)
        self.findings.say(name="step", **line)
        if self.findings.seconds > self.seconds:
            self.findings.say(name="stopped", reason=f"{self.seconds} s are over")
            trainer.should_stop = True
        self.ended = time.perf_counter()

    def _say_profile(self, kind: str) -> None:
        profiler, self.clock.profiler = self.clock.profiler, None
        name = f"kernels, {kind.removeprefix('profile ')}"
        self.findings.tried(name, lambda: say_kernels(self.findings, profiler, self.clock.device, name))
        if kind == "profile sampling" and (out := os.environ.get("OUT")):
            trace = str(Path(out) / "sampling_trace.json.gz")
            self.findings.tried("trace", lambda: profiler.export_chrome_trace(trace))

    def time_recordings(self) -> None:
        """Note the seconds of every recording of a graph from now on."""
        plain = GraphRecorder._recorded

        def recording(recorder: Any, work: Any) -> Any:
            began = time.perf_counter()
            made = plain(recorder, work)
            self.recorded.append(time.perf_counter() - began)
            return made

        GraphRecorder._recorded = recording  # type: ignore[method-assign]


def _groups_that_fit(device: torch.device) -> int:
    """Return how many groups of 3B fit in a pass beside weights, gradients and moments.

    Their activations are what must fit: 2 groups on 140 GB, 1 on 80 GB.
    """
    whole = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else float("inf")
    return 2 if whole > 100e9 else 1


def steps(findings: Findings, device: torch.device, rehearse: bool, work: noise.Work, seconds: float) -> None:
    """Make the updates of the plan, kind by kind, and say medians by kind."""
    from transformers import AutoConfig

    gpu = device.type == "cuda"
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "policy", side=work.side)
    shape = AutoConfig.from_pretrained(folder) if rehearse else noise.of_3b(folder)
    speed = None if rehearse else floor.speeds(device.type)
    with noise.loaded_as(shape, device):
        policy = noise.policy(folder, work.side, recompute=True)
    policy.stop_ids = policy.stop_ids.to(device)
    wait(device)
    numbers = sum(p.numel() for p in policy.parameters())
    memory = {"allocated_gb": round(torch.cuda.memory_allocated() / 1e9, 2)} if gpu else {}
    shapes = {"prompts": work.prompts, "group": work.group, "tokens": work.tokens, "side": work.side}
    findings.say(name="built", parameters=numbers, **shapes, **memory)
    clock, engine = Clock(device), SharedPrefixEngine(work.tokens)
    clock.around(engine, "sample", "sample")
    clock.around(policy, "prefill", "read prefixes")
    stage = noise.grpo_stage(TimedStage, policy, engine, work, work.prompts)
    plan = REHEARSED if rehearse else PLAN
    stage.clock, stage.findings, stage.plan = clock, findings, plan
    clock.around(stage.segmenter, "read", "parse and draw")
    turns = Turns(findings, clock, plan, work.tokens, seconds)
    turns.time_recordings()
    batches = noise.pictures(policy.encoder, work, len(plan) + 1)
    findings.tried(
        "fit", lambda: noise.fit(stage, batches, len(plan), gpu, half=not rehearse, callback=turns)
    )
    say_medians(findings, turns.lines, shape, work, speed)


def say_medians(
    findings: Findings, lines: list[dict[str, Any]], shape: Any, work: noise.Work, speed: Any
) -> None:
    """Say the medians by kind, and how far they are from the floor.

    The first step of a kind is left out where the kind has others.
    """
    for kind in dict.fromkeys(line["kind"] for line in lines):
        of_kind = [line for line in lines if line["kind"] == kind]
        some = [line for line in of_kind if not line["first_of_its_kind"]] or of_kind
        paths = some[0]["parts_s"]
        parts = {p: round(statistics.median(line["parts_s"].get(p, 0.0) for line in some), 4) for p in paths}
        taken = round(statistics.median(one["step_s"] for one in some), 4)
        line = {"kind": kind, "steps": len(some), "step_s": taken, "parts_s": parts}
        line |= {"peaks_gb": some[-1].get("peaks_gb"), "reserved_gb": some[-1].get("reserved_gb")}
        line["groups_in_a_pass"] = some[-1]["groups_in_a_pass"]
        if speed is not None and not kind.startswith("profile"):
            least = floor.floor(shape, floor.of_noise(work, kept=False), speed)
            line["floor_s"] = {name: round(value, 4) for name, value in least.items()}
            line["times_the_floor"] = round(taken / least["step"], 2)
        findings.say(name="median", **line)
