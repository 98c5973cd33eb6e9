"""What a composed configuration must hold, checked before any weight, and any heavy import, is loaded.

The constructors are the schema of what they take; here stand the ranges of numbers, and the keys of the top level.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=1, strict=True)]
Weight = Annotated[float, Field(ge=0)]
Bound = Annotated[float, Field(gt=0, le=10)]


class _Node(BaseModel):
    """A config group: known keys are checked, the rest is its constructor's business."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class Optimizer(_Node):
    """`stage.optimizer`."""

    lr: float = Field(gt=0, lt=1)


class Surrogate(_Node):
    """`stage.surrogate`."""

    low: Bound
    high: Bound
    dual: float | None = Field(None, gt=1)


class Stage(_Node):
    """`stage`."""

    target: str = Field(alias="_target_")
    optimizer: Optimizer
    max_grad_norm: float = Field(gt=0)
    group_size: Count = 2
    micro_batch_size: Count = 1
    completions_per_pass: Count | None = None
    updates_per_rollout: Count = 1
    epochs_per_rollout: Count = 1
    kl_weight: Weight = 0.0
    kl_reward: Weight = 0.0
    surrogate: Surrogate | None = None
    advantage: dict[str, Any] | None = None
    live_samples: Count | None = None
    mismatch_cap: float | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _sane(self) -> Stage:
        """A divergence in the loss and in the reward would be paid twice; an advantage relative to a group needs a group."""
        if self.advantage is not None and self.group_size < 2:
            raise ValueError(
                f"stage.group_size: at least 2 completions are needed to compare; got {self.group_size}"
            )
        if self.kl_weight > 0 and self.kl_reward > 0:
            raise ValueError(
                "stage.kl_reward: the divergence stands in the loss or in the reward, not in both"
            )
        return self


class Policy(_Node):
    """`policy`."""

    weights: str
    image_side: Count | None
    temperature: float = Field(gt=0, le=10)
    dtype: str = Field(pattern="^(float32|bfloat16|float16)$")
    train_vision: bool = Field(True, strict=True)
    gradient_checkpointing: bool = Field(False, strict=True)


class Head(_Node):
    """`head`."""

    precision: Literal["float32", "bfloat16"] = "float32"


class Grammar(_Node):
    """`grammar`."""

    target: str = Field(alias="_target_")
    instructions: Any = None

    @model_validator(mode="after")
    def _texts(self) -> Grammar:
        """A file, or its sections, whose texts the grammar's constructor looks at."""
        given = self.instructions
        if given is not None and not isinstance(given, str | dict):
            raise ValueError(f"grammar.instructions: null or a YAML file of texts is needed; got {given!r}")
        return self


class Rollout(_Node):
    """`rollout`."""

    target: str = Field(alias="_target_")
    max_tokens: Count
    max_prefix: Count = 1
    graphs: Annotated[bool, Field(strict=True)] | Literal["auto"] = "auto"
    sleep: bool = Field(True, strict=True)
    eager: bool = Field(False, strict=True)
    prefixes_at_once: Count | None = None


class Term(_Node):
    """`reward.terms.<name>`."""

    weight: float = Field(gt=0)
    needs: list[str] = []


class Reward(_Node):
    """`reward`."""

    terms: dict[str, Term] = Field(min_length=1)


class Data(_Node):
    """`data`."""

    batch_size: Count
    global_batch: Count | None = None
    workers: int = Field(ge=0, strict=True)


class Trainer(_Node):
    """`trainer`."""

    max_epochs: int = Field(ge=-1, strict=True)
    max_steps: int = Field(ge=-1, strict=True)
    precision: str | int
    devices: int | str | list[int]
    num_nodes: int = 1

    @model_validator(mode="after")
    def _some(self) -> Trainer:
        """A run makes at least one update, and float16, whose gradients are scaled, is not clipped and gathered right: precisions are two."""
        if self.precision not in ("bf16-mixed", "32-true", "32", 32):
            raise ValueError(f"trainer.precision: bf16-mixed or 32-true is needed; got {self.precision}")
        if self.max_steps == 0 or self.max_epochs == 0:
            raise ValueError("trainer.max_steps and max_epochs: -1 (no end) or at least 1 is needed; got 0")
        return self


class Paths(BaseModel):
    """`paths`."""

    model_config = ConfigDict(extra="forbid")
    runs: str
    datasets: str
    weights: str
    run: str


class TrainConfig(BaseModel):
    """The whole of `python -m segrl.train`."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(ge=0, lt=2**31, strict=True)
    init_from: str | None
    ckpt_path: str | None
    resume: str | None
    test_before: bool
    objective_metric: str | None
    sources: dict[str, str]
    stage: Stage
    policy: Policy
    reference: dict[str, Any] | None
    head: Head
    grammar: Grammar
    reward: Reward
    rollout: Rollout
    data: Data
    trainer: Trainer
    logger: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    paths: Paths

    @model_validator(mode="after")
    def _whole_groups(self) -> TrainConfig:
        """Every update has as many samples as the next, and every rollout all of its updates."""
        stage, batch = self.stage, self.data.batch_size
        if stage.live_samples is not None and stage.live_samples > batch:
            raise ValueError(
                f"stage.live_samples: at most data.batch_size ({batch}) is needed; got {stage.live_samples}"
            )
        key, samples = (
            ("data.batch_size", batch)
            if stage.live_samples is None
            else ("stage.live_samples", stage.live_samples)
        )
        if samples % stage.updates_per_rollout:
            raise ValueError(
                f"{key}: a multiple of stage.updates_per_rollout ({stage.updates_per_rollout}) is needed, so that groups stay whole; "
                f"got {samples}"
            )
        updates = stage.updates_per_rollout * stage.epochs_per_rollout
        if self.trainer.max_steps > 0 and self.trainer.max_steps % updates:
            raise ValueError(
                f"trainer.max_steps: a multiple of the {updates} updates that a rollout makes is needed; got {self.trainer.max_steps}"
            )
        return self


class Suite(BaseModel):
    """`suite`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    batch_size: Count
    greedy: bool
    masks: bool
    overlays: bool
    draws: int = Field(ge=0, strict=True)
    unions: dict[str, list[str]]


class TestSet(_Node):
    """`testsets.<name>`."""

    root: str | None
    published: Count | None
    ignored: bool = False
    samples: dict[str, Any]


class EvaluateConfig(TrainConfig):
    """The whole of `python -m segrl.evaluate`."""

    model: str | None
    suite: Suite
    scores: dict[str, Any]
    testsets: dict[str, TestSet]


def first_fault(error: ValidationError) -> str:
    """One line for the first of pydantic's findings: dotted key, what is needed, what came."""
    found = error.errors()[0]
    key = ".".join("_target_" if part == "target" else str(part) for part in found["loc"])
    if found["type"] == "value_error":  # of a validator of ours, which names its keys
        return found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        return f"{key}: there is no such key"
    came = "" if found["type"] == "missing" else f"; got {found['input']!r}"
    return f"{key}: {found['msg'][0].lower()}{found['msg'][1:]}{came}"
