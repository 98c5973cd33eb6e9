"""A GRPO step of noise, for measuring: random pictures, empty masks, random rewards, completions of one
length.

`grpo_stage` with `Pictures` is segrl's own stage; `trl_trainer` is TRL's trainer on the same work.
`grpo_step.py`, `scaling.py` and the `steps` and `peer` parts of `gpu_parts.py` measure them.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import no_contents
import tiny_vlm


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step: B prompts with an image each, G completions of T tokens, and the weight of the divergence."""

    prompts: int
    group: int = tiny_vlm.GROUP
    tokens: int = tiny_vlm.TOKENS
    side: int = tiny_vlm.SIDE
    beta: float = 0.0

    @property
    def prefix(self) -> int:
        """Return the tokens of a prompt: those of its image and 39 of its query."""
        return (self.side // 28) ** 2 + 39

    @property
    def patches(self) -> int:
        """Return the patches of an image."""
        return (self.side // 14) ** 2


def chat() -> list[dict[str, Any]]:
    """Return the chat that asks."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tiny_vlm.QUERY}]}]


def pictures(encoder: Any, work: Work, steps: int) -> Any:
    """Return a dataset of one batch per step.

    Pixels and tokens are made when a batch is asked for, as TRL does.
    """
    import torch

    from segrl.types import Batch, Sample

    class Pictures(torch.utils.data.Dataset[Batch]):
        """Images of noise."""

        def __len__(self) -> int:
            return steps

        def __getitem__(self, step: int) -> Batch:
            images = [tiny_vlm.image(step * work.prompts + i, work.side) for i in range(work.prompts)]
            samples = [Sample(id=str(i), image=one, mask=one[..., 0] > 255) for i, one in enumerate(images)]
            return Batch(samples=samples, prefixes=[encoder.encode(chat(), one) for one in images])

    return Pictures()


def policy(folder: Path, side: int, recompute: bool) -> Any:
    """Return segrl's policy of a folder, whose completions never stop."""
    import torch

    from segrl.models.hf_vlm import HFPolicy

    made = HFPolicy(str(folder), None, (28 * 28, side * side), 1.0, "float32", None, True, recompute)
    made.stop_ids = torch.tensor([-1], device=made.device)
    return made


def grpo_stage(kind: type, policy: Any, engine: Any, work: Work, micro_batch_size: int) -> Any:
    """Return a stage of this kind with AdamW and a random number as reward.

    The kind is `GRPOStage` or a class derived from it.
    """
    import torch

    from segrl.models.reference import FrozenCopy
    from segrl.objectives.advantages import group_relative
    from segrl.objectives.clipped import ppo_clip
    from segrl.objectives.kl import k3
    from segrl.objectives.masked import per_sequence
    from segrl.objectives.policy_gradient import PolicyGradient
    from segrl.prompts.tags import SegR1Points
    from segrl.rewards.mixture import RewardMixture
    from segrl.segmenter import Segmenter
    from segrl.stages.base import Optimization
    from segrl.stages.policy_gradient import Loop

    class NoHead(torch.nn.Module):
        """Returns empty masks: TRL's reward segments nothing either."""

        def prepare(self, images: Any) -> None:
            pass

        def segment(self, images: Any, prompts: Any) -> Any:
            return [[image[..., 0] > 255 for _ in some] for image, some in zip(images, prompts, strict=True)]

    noise = {"noise": {"fn": lambda answer, sample: random.random(), "weight": 1.0}}
    return kind(
        segmenter=Segmenter(policy=policy, grammar=SegR1Points(64), head=NoHead(), engine=engine),
        reward=RewardMixture(noise), reference=FrozenCopy if work.beta else None,
        objective=PolicyGradient(
            surrogate=partial(ppo_clip, low=0.2, high=0.2, dual=None), token_weights=per_sequence,
            divergence=k3, kl_weight=work.beta, kl_reward=0.0, mismatch_cap=None,
        ),
        loop=Loop(
            group_size=work.group, micro_batch_size=micro_batch_size, completions_per_pass=None,
            updates_per_rollout=1, epochs_per_rollout=1,
        ),
        optimization=Optimization(
            optimizer=partial(torch.optim.AdamW, lr=1e-6, fused=True), schedule=None, max_grad_norm=1.0
        ),
        seed=0, advantage=partial(group_relative, floor=1e-4), live_samples=None,
    )  # fmt: skip


def fit(stage: Any, batches: Any, steps: int, gpu: bool, half: bool, callback: Any) -> None:
    """Train for so many steps under Lightning; on a GPU a worker makes the batches."""
    import lightning
    import torch

    trainer = lightning.Trainer(
        accelerator="gpu" if gpu else "cpu", devices=1, precision="bf16-mixed" if half else "32-true",
        max_steps=steps, max_epochs=-1, logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=int(gpu), pin_memory=gpu)
    trainer.fit(stage, loader)


def trl_trainer(
    folder: Path, model: Any, work: Work, steps: int, at_once: int, gpu: bool, callback: Any
) -> Any:
    """Return TRL's trainer on the same work.

    Special tokens are suppressed, so that completions have one length.

    Args:
        folder: with the processor.
        model: of transformers.
        work: a step.
        steps: updates.
        at_once: prompts in one pass; the passes of an update accumulate.
        gpu: bfloat16 passes, activations computed again.
        callback: of transformers' trainer.
    """
    import datasets
    import transformers
    import trl
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(folder)
    special = [processor.tokenizer.convert_tokens_to_ids(name) for name in tiny_vlm.SPECIAL]
    asked = [{"role": "user", "content": tiny_vlm.QUERY}]
    rows = [
        {"prompt": asked, "image": Image.fromarray(tiny_vlm.image(i, work.side))}
        for i in range(steps * work.prompts)
    ]
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=not gpu, bf16=gpu, fp16=False,
        per_device_train_batch_size=work.group * at_once, gradient_accumulation_steps=work.prompts // at_once,
        num_generations=work.group, max_completion_length=work.tokens, beta=work.beta, max_steps=steps,
        learning_rate=1e-6, gradient_checkpointing=gpu, report_to="none", save_strategy="no",
        disable_tqdm=True, temperature=1.0, seed=0, generation_kwargs={"suppress_tokens": special},
        dataloader_num_workers=0, log_completions=False,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor,
        callbacks=[callback],
    )  # fmt: skip


@contextmanager
def loaded_as(shape: Any, device: Any) -> Iterator[None]:
    """Let transformers make a random model of this shape on the device instead of loading one.

    No file of 15 GB is written or read.
    """
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        GenerationConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    def build(*_: object, dtype: Any = torch.float32, attn_implementation: str = "sdpa", **given: Any) -> Any:
        shape._attn_implementation = attn_implementation
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(shape).to(dtype)
        text = shape.text_config
        model.generation_config = GenerationConfig(
            eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )
        model.tie_weights()
        found = dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), ())
        return (model, found) if given.get("output_loading_info") else model

    with mock.patch.object(AutoModelForImageTextToText, "from_pretrained", build):
        yield


def of_3b(folder: Path) -> Any:
    """Return Qwen2.5-VL-3B's shape with the token numbers of the processor in `folder`."""
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(folder)
    shape = no_contents.config(no_contents.SIZES["Qwen2.5-VL-3B"])
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(shape, name, getattr(own, name))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(shape.text_config, name, getattr(own.text_config, name))
    return shape
