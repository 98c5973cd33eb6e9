"""The keys of stages, and of the functions that they are put together from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from segrl.runs.schema.kinds import MOST, Open, Part, Positive, Rate, Seed, Share, Tokens, Weight, slot
from segrl.runs.schema.parts import Grammar, Places

Bound = Annotated[float, Field(gt=0, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Floor = Annotated[float, Field(gt=0, le=1)]


class AnyTorch(Open):
    """An optimizer or a schedule of torch that is not listed here: its keys are torch's business."""


class AnyOptimizer(AnyTorch):
    """Another optimizer of torch."""

    lr: Rate


class AdamW(Part):
    """`stage.optimizer`."""

    lr: Rate
    betas: Annotated[
        list[Beta], Field(min_length=2, max_length=2, description="a list of two numbers from 0 to below 1")
    ] = [0.9, 0.999]
    eps: float = Field(1e-8, gt=0, le=1)
    weight_decay: Share = 0.0
    fused: bool | None = None
    foreach: bool | None = None
    amsgrad: bool = False


class OneCycle(Part):
    """`stage.schedule`."""

    pct_start: Share
    cycle_momentum: bool = True
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = Field(25.0, ge=1, le=1e12)
    final_div_factor: float = Field(1e4, ge=1, le=1e12)


class Stage(Part):
    """What every stage has."""

    optimizer: Annotated[Any, slot("optimizer")]
    schedule: Annotated[Any, slot("schedule")] | None
    max_grad_norm: Positive
    seed: Seed


class Segmenting(Stage):
    """What every stage of a policy that segments has."""

    policy: Annotated[Any, slot("policy")]
    grammar: Grammar
    head: Annotated[Any, slot("head")]
    engine: Annotated[Any, slot("rollout")]
    micro_batch_size: Places


class SFT(Segmenting):
    """`stage=sft`."""

    trace: Annotated[Any, slot("trace")]
    also: Annotated[Any, slot("grammar", "list")]


class Tower(Stage):
    """`stage=tower`."""

    policy: Annotated[Any, slot("policy")]
    grammar: Grammar
    image_tokens: int = Field(ge=1, le=65_536)


class MaskHead(Stage):
    """`stage=mask_head`."""

    head: Annotated[Any, slot("head")]
    jitter: Share
    astray: Share


class PolicyGradient(Segmenting):
    """What every algorithm has."""

    reward: Annotated[Any, slot("reward")]
    reference: Annotated[Any, slot("reference")] | None
    group_size: int = Field(ge=1, le=4096)
    completions_per_pass: Places | None
    updates_per_rollout: int = Field(ge=1, le=4096)
    epochs_per_rollout: int = Field(ge=1, le=4096)
    surrogate: Annotated[Any, slot("surrogate")]
    token_weights: Annotated[Any, slot("token_weights")]
    divergence: Annotated[Any, slot("divergence")]
    kl_weight: Weight
    kl_reward: Weight
    mismatch_cap: Annotated[float, Field(ge=1, le=1e6)] | None


class GRPO(PolicyGradient):
    """`stage=grpo` and its relatives."""

    group_size: int = Field(ge=2, le=4096)  # an advantage relative to a group needs something to compare with
    advantage: Annotated[Any, slot("advantage")]
    live_samples: Annotated[int, Field(ge=1, le=1_000_000)] | None


class PPO(PolicyGradient):
    """`stage=ppo`."""

    critic: Annotated[Any, slot("critic")]
    critic_lr: Rate
    critic_warmup: int = Field(ge=0, le=MOST)
    shaping: Annotated[Any, slot("shaping")] | None
    decay: Annotated[Any, slot("decay")]
    critic_decay: Share
    discount: Share
    value_clip: Positive
    value_weight: Weight


class Bounds(Part):
    """A surrogate with two bounds."""

    low: Bound
    high: Bound


class PPOClip(Bounds):
    """PPO's surrogate."""

    dual: Annotated[float, Field(gt=1, le=1e6)] | None = None


class Budget(Part):
    """Token weights of a fixed budget."""

    budget: Tokens


class Relative(Part):
    """An advantage that is divided by a deviation."""

    floor: Floor


class Critic(Part):
    """`stage.critic`."""

    insight: Literal[0, 5]
    prior: float = Field(ge=-1e6, le=1e6)


class AdapterCritic(Critic):
    """A critic with an adapter of its own."""

    lora: Annotated[Any, slot("lora")]


class Decay(Part):
    """`stage.decay`."""

    decay: Share


class Shaping(Part):
    """`stage.shaping`."""

    potential: Annotated[Any, slot("potential")]
    weight: Positive
