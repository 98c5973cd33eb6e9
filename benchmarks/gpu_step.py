"""One GRPO update of a policy of real size on a GPU: beside TRL 1.16's GRPOTrainer, and beside the floor of this very GPU.

`python benchmarks/gpu_step.py [--prompts 8] [--alone]` writes random weights of Qwen2.5-VL-3B's shape to a temporary folder (15 GB) and prints one
JSON line: 8 completions of 256 tokens for each 768x768 image, bfloat16 passes, activations computed again on both sides, AdamW, no reference, a random
reward; TRL generates with transformers and a static cache. `kept` is our side once more with activations kept, two groups at a time. Medians over the steps behind the first, on the wall. `--rehearse` runs the same on a CPU
with the tiny policy: it shows that the script works, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import floor
import grpo_step
import no_contents
import tiny_vlm

OURS = ("ours", "kept")


def side_of(name: str, folder: Path, prompts: int, length: int, side: int, gpu: bool) -> dict[str, float]:
    """Medians of one side, in a process of its own."""
    python = [sys.executable] if name in OURS else grpo_step.peers_python()
    command = [*python, __file__, "--side", name, str(folder), str(prompts), str(length), str(side), str(int(gpu))]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    medians: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return medians


def measure(name: str, folder: Path, prompts: int, length: int, side: int, gpu: bool) -> dict[str, float]:
    """What `side_of` runs."""
    import torch

    sampling: list[float] = []
    if name in OURS:
        steps = grpo_step.ours(folder, prompts, 0.0, tiny_vlm.GROUP, length, side, gpu, sampling, name == "kept")
    else:
        steps = grpo_step.theirs(folder, prompts, 0.0, tiny_vlm.GROUP, length, side, gpu)
    found = {"step": statistics.median(steps)}
    if sampling:
        found["sample"] = statistics.median(sampling[1:])
        found["learn"] = found["step"] - found["sample"]
    if gpu:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def main() -> None:
    """Both sides, and the floor."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="without TRL")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with the tiny policy")
    asked = parser.parse_args()
    gpu, folder = not asked.rehearse, Path(tempfile.mkdtemp()) / "policy"
    length, side = (256, 768) if gpu else (16, tiny_vlm.SIDE)
    if gpu:
        size = no_contents.SIZES["Qwen2.5-VL-3B"]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision = {**no_contents.VISION, "out_hidden_size": size["hidden_size"]}
        tiny_vlm.write(folder, {"text": {**size, "rope_parameters": rope}, "vision": vision}, side)
    else:
        tiny_vlm.write(folder)
    from transformers import AutoConfig

    sides = [*OURS] if asked.alone else [*OURS, "theirs"]
    seconds = {name: side_of(name, folder, asked.prompts, length, side, gpu) for name in sides}
    image = side // 28
    work = floor.Work(
        prompts=asked.prompts, group=tiny_vlm.GROUP, prefix=image**2 + 39, patches=4 * image**2, tokens=length, reference=False, kept=False
    )  # fmt: skip
    least = floor.floor(AutoConfig.from_pretrained(folder), work, floor.speeds("cuda" if gpu else "cpu"))
    parts = {  # sampling reads the prefixes
        "step": least["step"], "sample": least["read prefixes"] + least["sample"], "learn": least["learn"] + least["AdamW"],
    }  # fmt: skip
    times = {name: {part: round(seconds[name][part] / value, 2) for part, value in parts.items()} for name in OURS}
    line = {"prompts": asked.prompts, "group": tiny_vlm.GROUP, "tokens": length, "side": side, "rehearsal": asked.rehearse, **seconds,
            "floor": least, "times_the_floor": times}  # fmt: skip
    if "theirs" in seconds:
        line["ratio"] = round(seconds["theirs"]["step"] / seconds["ours"]["step"], 2)
    print(json.dumps(line))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        name, folder, *numbers = sys.argv[2:]
        prompts, length, side, gpu = map(int, numbers)
        print(json.dumps(measure(name, Path(folder), prompts, length, side, bool(gpu))))
    else:
        main()
