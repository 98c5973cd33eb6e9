"""One GRPO update on a tiny VLM, beside TRL 1.16's GRPOTrainer: CPU seconds of a whole step, one thread.

`python benchmarks/grpo_step.py` prints one JSON line per case: 1 prompt x 8 completions x 64 tokens with and
without a reference, and 2 prompts. Both sides use AdamW, gradient norm 1, float32, no gradient checkpointing,
and a random number as reward. The figures are medians over the steps of all rounds. The two sides take turns,
and the first step of each process is warm-up. The floor is the time that a step's arithmetic and bytes take
at the thread's measured speeds (`floor.py`). The script exits with 1 where a bar is missed. TRL runs in an
environment of its own, which uv makes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import noise
import tiny_vlm

PEER = ("trl==1.16.0", "transformers==5.23.0", "torch==2.13.0", "torchvision", "datasets", "pillow")
STEPS, ROUNDS = 4, 3
CASES = {  # prompts, weight of the divergence from a reference, how many times our CPU time theirs has to be
    "no reference": (1, 0.0, 6.0),
    "reference": (1, 0.04, 6.5),
    "two prompts": (2, 0.0, 9.0),
}


def ours(folder: Path, work: noise.Work) -> list[float]:
    """Return the CPU seconds of each step of a GRPOStage under Lightning, the loader's work included."""
    import lightning

    from segrl.rollout.shared_prefix import SharedPrefixEngine
    from segrl.stages.grpo import GRPOStage

    class Clock(lightning.Callback):
        """Notes when each step ended."""

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.process_time())

    random.seed(0)
    ends: list[float] = []
    policy = noise.policy(folder, work.side, recompute=False)
    stage = noise.grpo_stage(GRPOStage, policy, SharedPrefixEngine(work.tokens), work, work.prompts)
    batches = noise.pictures(policy.encoder, work, STEPS + 1)
    noise.fit(stage, batches, STEPS + 1, gpu=False, half=False, callback=Clock())
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def theirs(folder: Path, work: noise.Work) -> list[float]:
    """Return the same of TRL's trainer."""
    import torch
    import transformers

    class Clock(transformers.TrainerCallback):
        """Notes when each step ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    ends: list[float] = []
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    noise.trl_trainer(
        folder, model, work, STEPS + 1, at_once=work.prompts, gpu=False, callback=Clock()
    ).train()
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def least(folder: Path, work: noise.Work) -> list[float]:
    """Return the seconds that the work of a step takes at the measured speeds of one thread."""
    import floor
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return [floor.floor(config, floor.of_noise(work, kept=True), floor.speeds("cpu"))["step"]]


def peers_python() -> list[str]:
    """Return the command that runs a script in an environment of the peer's own."""
    uv = shutil.which("uv") or str(Path(__file__).resolve().parents[1] / ".uv" / "bin" / "uv")
    packages = [f"--with={name}" for name in PEER]
    return [uv, "run", "--quiet", "--isolated", "--no-project", *packages, "python"]


def main() -> int:
    """Measure both sides in turn, for every case."""
    alone = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    sides = {"ours": [sys.executable], "theirs": peers_python(), "least": [sys.executable]}
    folder, passed = tiny_vlm.write(Path(tempfile.mkdtemp()) / "tiny"), True
    for name, (prompts, beta, bar) in CASES.items():
        seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "least": []}
        for _ in range(ROUNDS):
            for side, python in sides.items():
                command = [*python, __file__, side, str(folder), str(prompts), str(beta)]
                done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
                if done.returncode:
                    sys.exit(f"{side}: {done.stderr[-2000:]}")
                seconds[side] += json.loads(done.stdout.splitlines()[-1])
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        ratio = medians["theirs"] / medians["ours"]
        of_floor = medians["ours"] / medians["least"]
        passed = passed and ratio >= bar
        print(json.dumps({
            "case": name, "prompts": prompts, "group": tiny_vlm.GROUP, "tokens": tiny_vlm.TOKENS,
            "beta": beta, "peer": PEER[0],
            "cpu_seconds": {side: round(value, 3) for side, value in medians.items()},
            "ratio": round(ratio, 2), "times_the_floor": round(of_floor, 2), "bar": bar,
            "passed": ratio >= bar,
        }), flush=True)  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in ("ours", "theirs", "least"):
        side = {"ours": ours, "theirs": theirs, "least": least}[sys.argv[1]]
        work = noise.Work(prompts=int(sys.argv[3]), beta=float(sys.argv[4]))
        print(json.dumps(side(Path(sys.argv[2]), work)))
    else:
        sys.exit(main())
