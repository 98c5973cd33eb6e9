"""The same update by TRL's trainer.

One pass takes as many groups as fit beside 60 GB of weights, gradients and moments.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import noise
import tiny_vlm
import torch

from gpu_kit.clock import wait
from gpu_kit.findings import Findings

STEPS = 3


def peer(findings: Findings, device: torch.device, rehearse: bool, work: noise.Work) -> None:
    """Say the seconds of each of TRL's steps, and its peak memory."""
    import transformers
    import trl

    gpu = device.type == "cuda"
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "policy", side=work.side)
    shape = transformers.AutoConfig.from_pretrained(folder) if rehearse else noise.of_3b(folder)

    class Clock(transformers.TrainerCallback):
        """Says what each step took."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait(device)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            memory = {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if gpu else {}
            taken = round(time.perf_counter() - self.began, 3)
            findings.say(
                name="step",
                step_s=taken,
                prompts=work.prompts,
                tokens=work.tokens,
                trl=trl.__version__,
                **memory,
            )

    with noise.loaded_as(shape, device):
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    trainer = noise.trl_trainer(folder, model, work, STEPS, at_once=1, gpu=gpu, callback=Clock())
    findings.say(name="built", version=trl.__version__)
    trainer.train()
