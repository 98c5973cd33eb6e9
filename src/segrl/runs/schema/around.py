"""Define the keys of scores, callbacks, logger, trainer and suite, with types and ranges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from segrl.runs.schema.kinds import MOST, Count, Part, Text, slot
from segrl.runs.schema.parts import Places

METRICS = Literal[
    "sm", "wfm", "mae", "adp_e", "mean_e", "max_e", "adp_f", "mean_f", "max_f",
    "iou", "ciou", "hce", "biou", "mba",
]  # fmt: skip


PRECISIONS = Literal["bf16-mixed", "32-true", "32", 32]


class Saliency(Part):
    """Keys of `scores` for grey maps and masks."""

    metrics: list[METRICS] = Field(min_length=1)


class ReferringScores(Part):
    """Keys of `scores` for referring expressions."""

    empty: Literal["one", "zero", "skip"]
    ignore: Literal["exclude", "background", "target"]
    no_target: bool


class Progress(Part):
    """Keys of `callbacks.progress`."""

    every_seconds: float = Field(ge=0, le=86_400)


class InFolder(Part):
    """Keys of `callbacks.history`."""

    folder: Text


class Sheets(InFolder):
    """Keys of `callbacks.sheets`."""

    every_n_steps: Count


class EveryNSteps(Part):
    """Keys of `callbacks.checkpoint`."""

    path: Text
    every_n_steps: Count


class KeepBest(Part):
    """Keys of `callbacks.best`."""

    path: Text
    monitor: Text | None


class Alarms(Part):
    """Keys of `callbacks.alarms`."""

    window: int = Field(ge=1, le=100_000)
    rules: Annotated[Any, slot("rule", "dict")]


class Rule(Part):
    """Keys of `callbacks.alarms.rules.NAME`."""

    scalar: Text
    stop: bool
    above: float = Field(0.0, ge=-1e12, le=1e12)
    below: float = Field(0.0, ge=-1e12, le=1e12)
    collapse: float = Field(0.0, gt=0, lt=1)
    explosion: float = Field(2.0, gt=1, le=1e12)


class Tracked(Part):
    """Keys of `logger=mlflow`."""

    tracking_uri: Text
    artifacts: Text
    experiment: Text
    checkpoints: bool = False


class Trainer(Part):
    """Keys of `trainer`: the arguments of Lightning's Trainer that segrl supports."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    devices: (
        Annotated[int, Field(ge=1, le=4096)]
        | Literal["auto", -1]
        | Annotated[list[Annotated[int, Field(ge=0, le=4095)]], Field(min_length=1)]
    )
    num_nodes: int = Field(1, ge=1, le=65_536)
    strategy: Literal["auto", "ddp"] | Annotated[Any, slot("strategy")] = "auto"
    precision: PRECISIONS
    max_epochs: Literal[-1] | Count
    max_steps: Literal[-1] | Count
    val_check_interval: Count | None
    log_every_n_steps: Count
    num_sanity_val_steps: int = Field(ge=0, le=MOST)
    use_distributed_sampler: Literal[False]
    enable_progress_bar: bool
    enable_model_summary: bool
    enable_checkpointing: Literal[False]


class ZeRO(Part):
    """Keys of `trainer.strategy` (trainer=deepspeed_zero1, 2, 3)."""

    zero_stage: Literal[1, 2, 3]


class Suite(Part):
    """Keys of `suite`."""

    name: Text
    batch_size: Places
    greedy: bool
    masks: bool
    overlays: bool
    draws: int = Field(ge=0, le=1_000_000)
    unions: dict[str, list[str]] = Field(description="names, each with a list of test sets")
