"""One GRPO update on a tiny VLM, side by side with TRL 1.16's GRPOTrainer: CPU seconds of a whole step, one thread.

`python benchmarks/grpo_step.py` prints one JSON line per case: 1 prompt x 8 completions x 64 tokens with and without a reference, and
2 prompts; AdamW, gradient norm 1, float32, no gradient checkpointing, a reward that is a random number. Medians over the steps of the
rounds, which take turns; the first step of each process is warm-up. Exits with 1 where a bar is missed. TRL runs in an environment that uv makes of its own.
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

import tiny_vlm

PEER = ("trl==1.16.0", "transformers==5.23.0", "torch==2.13.0", "torchvision", "datasets", "pillow")
STEPS, ROUNDS = 4, 3
CASES = {  # prompts, weight of the divergence from a reference, how many times our CPU time theirs has to be
    "no reference": (1, 0.0, 4.5),
    "reference": (1, 0.04, 4.0),
    "two prompts": (2, 0.0, 4.5),
}


def ours(
    folder: Path, prompts: int, beta: float, group: int = tiny_vlm.GROUP, length: int = tiny_vlm.TOKENS, side: int = tiny_vlm.SIDE
) -> list[float]:  # fmt: skip
    """CPU seconds of each step of a GRPOStage under Lightning, the loader's work included."""
    from functools import partial

    import lightning
    import torch

    from segrl.models.hf_vlm import HFPolicy
    from segrl.models.reference import FrozenCopy
    from segrl.objectives.advantages import group_relative
    from segrl.objectives.clipped import ppo_clip
    from segrl.objectives.kl import k3
    from segrl.objectives.masked import per_sequence
    from segrl.prompts.tags import SegR1Points
    from segrl.rewards.mixture import RewardMixture
    from segrl.rollout.shared_prefix import SharedPrefixEngine
    from segrl.stages.grpo import GRPOStage
    from segrl.types import Batch, Sample

    class NoHead(torch.nn.Module):
        """Empty masks: TRL's reward segments nothing either."""

        def prepare(self, images: Any) -> None:
            pass

        def segment(self, images: Any, prompts: Any) -> Any:
            return [[image[..., 0] > 255 for _ in some] for image, some in zip(images, prompts, strict=True)]

    class Images(torch.utils.data.Dataset[Batch]):
        """Noise, made into batches where it is asked for, as TRL does."""

        def __len__(self) -> int:
            return STEPS + 1

        def __getitem__(self, step: int) -> Batch:
            pictures = [tiny_vlm.image(step * prompts + i, side) for i in range(prompts)]
            samples = [Sample(id=str(i), image=p, mask=p[..., 0] > 255) for i, p in enumerate(pictures)]
            asked = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tiny_vlm.QUERY}]}
            ]
            return Batch(samples=samples, prefixes=[policy.encoder.encode(asked, p) for p in pictures])

    class Clock(lightning.Callback):
        """When each step ended."""

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.process_time())

    random.seed(0)
    ends: list[float] = []
    policy = HFPolicy(str(folder), None, (28 * 28, side * side), 1.0, "float32", "sdpa", None, True, False)
    policy.stop_ids = torch.tensor([-1])  # completions of fixed length, as on the other side
    stage = GRPOStage(
        policy, SegR1Points(64), NoHead(), SharedPrefixEngine(length),
        RewardMixture({"noise": {"fn": lambda answer, sample: random.random(), "weight": 1.0}}), FrozenCopy if beta else None,
        partial(torch.optim.AdamW, lr=1e-6, fused=True), None, 1.0, 0, group, prompts, None, 1, 1,
        partial(ppo_clip, low=0.2, high=0.2, dual=None), partial(per_sequence), partial(k3), beta, 0.0, None,
        partial(group_relative, floor=1e-4), None,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS + 1, logger=False, callbacks=[Clock()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(stage, torch.utils.data.DataLoader(Images(), batch_size=None))
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def theirs(folder: Path, prompts: int, beta: float) -> list[float]:
    """The same of TRL's trainer; special tokens are suppressed, so that completions have the same length."""
    import datasets
    import torch
    import transformers
    import trl
    from PIL import Image

    class Clock(transformers.TrainerCallback):
        """When each step ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    ends: list[float] = []
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    rows = [
        {"prompt": [{"role": "user", "content": tiny_vlm.QUERY}], "image": Image.fromarray(tiny_vlm.image(i))}
        for i in range((STEPS + 1) * prompts)
    ]
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, fp16=False, per_device_train_batch_size=tiny_vlm.GROUP * prompts,
        num_generations=tiny_vlm.GROUP, max_completion_length=tiny_vlm.TOKENS, beta=beta, max_steps=STEPS + 1, learning_rate=1e-6,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, temperature=1.0, seed=0,
        generation_kwargs={"suppress_tokens": [processor.tokenizer.convert_tokens_to_ids(name) for name in tiny_vlm.SPECIAL]},
        dataloader_num_workers=0, log_completions=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [random.random() for _ in completions], args=settings,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=processor, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def main() -> int:
    """Both sides in turn, every case."""
    uv = shutil.which("uv") or str(Path(__file__).resolve().parents[1] / ".uv" / "bin" / "uv")
    isolated = [
        uv,
        "run",
        "--quiet",
        "--isolated",
        "--no-project",
        *(f"--with={name}" for name in PEER),
        "python",
    ]
    folder, passed = tiny_vlm.write(Path(tempfile.mkdtemp()) / "tiny"), True
    for name, (prompts, beta, bar) in CASES.items():
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            for side, python in (("ours", [sys.executable]), ("theirs", isolated)):
                command = [*python, __file__, side, str(folder), str(prompts), str(beta)]
                alone = {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    "CUDA_VISIBLE_DEVICES": "",
                }
                done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
                if done.returncode:
                    sys.exit(f"{side}: {done.stderr[-2000:]}")
                seconds[side] += json.loads(done.stdout.splitlines()[-1])
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        ratio = medians["theirs"] / medians["ours"]
        passed = passed and ratio >= bar
        print(json.dumps({
            "case": name, "prompts": prompts, "group": tiny_vlm.GROUP, "tokens": tiny_vlm.TOKENS, "beta": beta, "peer": PEER[0],
            "cpu_seconds": {side: round(value, 3) for side, value in medians.items()}, "ratio": round(ratio, 2), "bar": bar, "passed": ratio >= bar,
        }), flush=True)  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in ("ours", "theirs"):
        side = ours if sys.argv[1] == "ours" else theirs
        print(json.dumps(side(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
    else:
        sys.exit(main())
