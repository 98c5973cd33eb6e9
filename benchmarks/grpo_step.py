"""One GRPO update on a tiny VLM, side by side with TRL 1.16's GRPOTrainer: CPU seconds of a whole step, one thread.

`python benchmarks/grpo_step.py` prints one JSON line per case: 1 prompt x 8 completions x 64 tokens with and without a reference, and
2 prompts; AdamW, gradient norm 1, float32, no gradient checkpointing, a reward that is a random number. Medians over the steps of the
rounds, which take turns; the first step of each process is warm-up. The floor is what a step's arithmetic and bytes take at the thread's measured speeds (`floor.py`). Exits with 1 where a bar is missed. TRL runs in an environment that uv makes of its own.
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


def clock(gpu: bool) -> float:
    """CPU seconds of the process; with a GPU, seconds on the wall when it has done what it was given."""
    if not gpu:
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def ours(
    folder: Path, prompts: int, beta: float, group: int = tiny_vlm.GROUP, length: int = tiny_vlm.TOKENS, side: int = tiny_vlm.SIDE,
    gpu: bool = False, sampling: list[float] | None = None, kept: bool = False,
) -> list[float]:  # fmt: skip
    """Seconds of each step of a GRPOStage under Lightning, the loader's work included where it is in this process.

    `sampling` takes the seconds of each rollout's sampling, what waits for it included. On a GPU: bfloat16 passes, activations
    computed again or, of two groups at once, kept, a worker for the images.
    """
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
            ends.append(clock(gpu))

    class Engine(SharedPrefixEngine):
        """Says how long it samples."""

        def sample(self, *given: Any, **keys: Any) -> Any:
            began = clock(gpu)
            said = super().sample(*given, **keys)
            if sampling is not None:
                sampling.append(clock(gpu) - began)
            return said

    random.seed(0)
    ends: list[float] = []
    policy = HFPolicy(str(folder), None, (28 * 28, side * side), 1.0, "float32", None, True, gpu and not kept)
    policy.stop_ids = torch.tensor([-1])  # completions of fixed length, as on the other side
    stage = GRPOStage(
        policy, SegR1Points(64), NoHead(), Engine(length),
        RewardMixture({"noise": {"fn": lambda answer, sample: random.random(), "weight": 1.0}}), FrozenCopy if beta else None,
        partial(torch.optim.AdamW, lr=1e-6, fused=True), None, 1.0, 0, group, min(prompts, 2) if kept else prompts, None, 1, 1,
        partial(ppo_clip, low=0.2, high=0.2, dual=None), partial(per_sequence), partial(k3), beta, 0.0, None,
        partial(group_relative, floor=1e-4), None,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="gpu" if gpu else "cpu", devices=1, precision="bf16-mixed" if gpu else "32-true", max_steps=STEPS + 1, logger=False, callbacks=[Clock()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(stage, torch.utils.data.DataLoader(Images(), batch_size=None, num_workers=int(gpu), pin_memory=gpu))
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def theirs(
    folder: Path, prompts: int, beta: float, group: int = tiny_vlm.GROUP, length: int = tiny_vlm.TOKENS, side: int = tiny_vlm.SIDE,
    gpu: bool = False,
) -> list[float]:  # fmt: skip
    """The same of TRL's trainer; special tokens are suppressed, so that completions have the same length."""
    import datasets
    import torch
    import transformers
    import trl
    from PIL import Image

    class Clock(transformers.TrainerCallback):
        """When each step ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock(gpu))

    ends: list[float] = []
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    rows = [
        {"prompt": [{"role": "user", "content": tiny_vlm.QUERY}], "image": Image.fromarray(tiny_vlm.image(i, side))}
        for i in range((STEPS + 1) * prompts)
    ]
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=not gpu, bf16=gpu, fp16=False, per_device_train_batch_size=group * prompts,
        num_generations=group, max_completion_length=length, beta=beta, max_steps=STEPS + 1, learning_rate=1e-6,
        gradient_checkpointing=gpu, report_to="none", save_strategy="no", disable_tqdm=True, temperature=1.0, seed=0,
        generation_kwargs={"suppress_tokens": [processor.tokenizer.convert_tokens_to_ids(name) for name in tiny_vlm.SPECIAL]},
        cache_implementation="static" if gpu else None, dataloader_num_workers=0, log_completions=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [random.random() for _ in completions], args=settings,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=processor, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def least(folder: Path, prompts: int, beta: float) -> list[float]:
    """Seconds that the work of a step takes at the measured speeds of one thread."""
    import floor
    from transformers import AutoConfig

    work = floor.Work(
        prompts=prompts, group=tiny_vlm.GROUP, prefix=(tiny_vlm.SIDE // 28) ** 2 + 39, patches=(tiny_vlm.SIDE // 14) ** 2, tokens=tiny_vlm.TOKENS,
        reference=beta > 0, kept=True,
    )  # fmt: skip
    return [floor.floor(AutoConfig.from_pretrained(folder), work, floor.speeds("cpu"))["step"]]


def peers_python() -> list[str]:
    """What runs a script in an environment of the peer's own."""
    uv = shutil.which("uv") or str(Path(__file__).resolve().parents[1] / ".uv" / "bin" / "uv")
    return [
        uv,
        "run",
        "--quiet",
        "--isolated",
        "--no-project",
        *(f"--with={name}" for name in PEER),
        "python",
    ]


def main() -> int:
    """Both sides in turn, every case."""
    folder, passed = tiny_vlm.write(Path(tempfile.mkdtemp()) / "tiny"), True
    for name, (prompts, beta, bar) in CASES.items():
        seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "least": []}
        for _ in range(ROUNDS):
            for side, python in (("ours", [sys.executable]), ("theirs", peers_python()), ("least", [sys.executable])):  # fmt: skip
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
        of_floor = medians["ours"] / medians["least"]
        passed = passed and ratio >= bar
        print(json.dumps({
            "case": name, "prompts": prompts, "group": tiny_vlm.GROUP, "tokens": tiny_vlm.TOKENS, "beta": beta, "peer": PEER[0],
            "cpu_seconds": {side: round(value, 3) for side, value in medians.items()}, "ratio": round(ratio, 2), "times_the_floor": round(of_floor, 2), "bar": bar, "passed": ratio >= bar,
        }), flush=True)  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in ("ours", "theirs", "least"):
        side = {"ours": ours, "theirs": theirs, "least": least}[sys.argv[1]]
        print(json.dumps(side(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
    else:
        sys.exit(main())
