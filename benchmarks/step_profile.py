"""Where a GRPO step on the tiny VLM stands above its floor: CPU seconds by part and by kind of operation.

`python benchmarks/step_profile.py [--prompts 2] [--beta 0.04]` prints one JSON line per part with its floor
(`floor.py`), and one per kind of operation: products, attention, everything elementwise, and the time between
operations (Python and torch's dispatch). The work is that of `grpo_step.py`, on one thread. Parts are medians
of three steps; operations are those of a fourth step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import floor
import lightning
import noise
import tiny_vlm
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.stages.grpo import GRPOStage

STEPS = 5
PRODUCTS = ("mkldnn::", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
PARTS = {  # of the floor: ours
    "read prefixes": ("prefill",), "sample": ("sample",), "learn": ("forward", "backward_part"),
    "reference": ("reference_logprobs",), "AdamW": ("rest of the update",),
}  # fmt: skip


class Parts(lightning.Callback):
    """Measures CPU seconds of methods at each step, and the operations of the last step."""

    def __init__(self) -> None:
        self.now, self.steps = Counter[str](), list[Counter[str]]()
        self.profiler: Any = None

    def around(self, owner: Any, method: str) -> None:
        """Time every call of a method of an object."""
        plain = getattr(owner, method)

        def timed(*given: Any, **keys: Any) -> Any:
            began = time.process_time()
            try:
                return plain(*given, **keys)
            finally:
                self.now[method] += time.process_time() - began

        object.__setattr__(owner, method, timed)

    def on_train_batch_start(self, trainer: Any, stage: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        self.now.clear()
        if batch_idx == STEPS - 1:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()
        self.began = time.process_time()

    def on_train_batch_end(self, trainer: Any, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a step."""
        self.now["step"] = time.process_time() - self.began
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
        self.now["rest of the update"] = self.now["update"] - self.now["forward"] - self.now["backward_part"]
        self.steps.append(Counter(self.now))


def main() -> None:
    """Run a few steps and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    work = noise.Work(prompts=asked.prompts, beta=asked.beta)
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "tiny")
    policy, parts = noise.policy(folder, work.side, recompute=False), Parts()
    engine = SharedPrefixEngine(work.tokens)
    stage = noise.grpo_stage(GRPOStage, policy, engine, work, work.prompts)
    parts.around(engine, "sample")
    parts.around(policy, "prefill")
    for method in ("forward", "backward_part", "update", "reference_logprobs"):
        parts.around(stage, method)
    batches = noise.pictures(policy.encoder, work, STEPS)
    noise.fit(stage, batches, STEPS, gpu=False, half=False, callback=parts)
    measured = parts.steps[1:-1]
    least = floor.floor(
        AutoConfig.from_pretrained(folder), floor.of_noise(work, kept=True), floor.speeds("cpu")
    )
    for name, methods in {**PARTS, "step": ("step",)}.items():
        seconds = statistics.median(sum(step[method] for method in methods) for step in measured)
        line = {"part": name, "cpu_seconds": round(seconds, 4), "floor": round(least[name], 4)}
        print(json.dumps({**line, "times": round(seconds / least[name], 2) if least[name] else None}))
    kinds = Counter[str]()
    for event in parts.profiler.key_averages():
        kind = "products" if event.key.startswith(PRODUCTS) else "elementwise and copies"
        kinds["attention" if "attention" in event.key else kind] += event.self_cpu_time_total / 1e6
    kinds["between operations"] = max(0.0, parts.steps[-1]["step"] - sum(kinds.values()))
    for kind, seconds in kinds.most_common():
        print(json.dumps({"operations": kind, "cpu_seconds": round(seconds, 4), "profiled": True}))


if __name__ == "__main__":
    main()
