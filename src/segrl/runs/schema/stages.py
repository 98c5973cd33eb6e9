"""Define the keys of stages and of the functions that stages are composed of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from segrl.runs.schema.kinds import MOST, Open, Part, Positive, Rate, Seed, Share, Tokens, Weight, slot
from segrl.runs.schema.parts import Grammar, Places

Bound = Annotated[float, Field(gt=0, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Floor = Annotated[float, Field(gt=0, le=1)]


class AnyTorch(Open):
    """An optimizer or schedule of torch without a model here; its keys are not checked."""


class AnyOptimizer(AnyTorch):
    """An optimizer of torch without a model here; only its learning rate is checked."""

    lr: Rate


class AdamW(Part):
    """Keys of `stage.optimizer`."""

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
    """Keys of `stage.schedule`."""

    pct_start: Share
    cycle_momentum: bool = True
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = Field(25.0, ge=1, le=1e12)
    final_div_factor: float = Field(1e4, ge=1, le=1e12)


class Stage(Part):
    """Keys that all stages have."""

    optimizer: Annotated[Any, slot("optimizer")]
    schedule: Annotated[Any, slot("schedule")] | None
    max_grad_norm: Positive
    seed: Seed


class Segmenting(Stage):
    """Keys of all stages whose policy segments."""

    policy: Annotated[Any, slot("policy")]
    grammar: Grammar
    head: Annotated[Any, slot("head")]
    engine: Annotated[Any, slot("rollout")]
    micro_batch_size: Places


class SFT(Segmenting):
    """Keys of `stage=sft` and `stage=sft_traces`."""

    trace: Annotated[Any, slot("trace")]
    also: Annotated[Any, slot("grammar", "list")]


class Tower(Stage):
    """Keys of `stage=tower`."""

    policy: Annotated[Any, slot("policy")]
    grammar: Grammar
    image_tokens: int = Field(ge=1, le=65_536)


class MaskHead(Stage):
    """Keys of `stage=mask_head`."""

    head: Annotated[Any, slot("head")]
    jitter: Share
    astray: Share


class PolicyGradient(Segmenting):
    """Keys of all reinforcement learning stages."""

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
    """Keys of `stage=grpo` and the other stages without a critic."""

    group_size: int = Field(ge=2, le=4096)  # an advantage relative to a group needs two completions
    advantage: Annotated[Any, slot("advantage")]
    live_samples: Annotated[int, Field(ge=1, le=1_000_000)] | None


class PPO(PolicyGradient):
    """Keys of `stage=ppo` and `stage=ppo_dense`."""

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
    """Keys of a surrogate with two bounds."""

    low: Bound
    high: Bound


class PPOClip(Bounds):
    """Keys of PPO's surrogate."""

    dual: Annotated[float, Field(gt=1, le=1e6)] | None = None


class Budget(Part):
    """Keys of token weights with a fixed budget."""

    budget: Tokens


class Relative(Part):
    """Keys of an advantage that is divided by a standard deviation."""

    floor: Floor


class Critic(Part):
    """Keys of `stage.critic`."""

    insight: Literal[0, 5]
    prior: float = Field(ge=-1e6, le=1e6)


class AdapterCritic(Critic):
    """Keys of a critic with its own adapter."""

    lora: Annotated[Any, slot("lora")]


class Decay(Part):
    """Keys of `stage.decay`."""

    decay: Share


class Shaping(Part):
    """Keys of `stage.shaping`."""

    potential: Annotated[Any, slot("potential")]
    weight: Positive
