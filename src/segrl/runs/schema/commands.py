"""Define the keys of each command, and the rules that involve two keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from segrl.runs.schema.around import METRICS, PRECISIONS
from segrl.runs.schema.kinds import Part, Seed, Share, Text, Tokens, shown, slot

Name = Annotated[
    str, Field(pattern=r"^[\w.-]*\w[\w.-]*$", description="a name of letters, digits, _, . and -")
]
Sources = Annotated[
    dict[str, str], Field(description="keys of files, each with the place where its owners publish it")
]

SCALARS = {
    "reward/total", "reward/spread",
    "policy/loss", "policy/ratio", "policy/clip_low", "policy/clip_high", "policy/drift", "policy/kl",
    "policy/entropy", "policy/mismatch", "policy/grad_norm",
    "critic/value", "critic/value_loss", "critic/value_clip", "critic/explained_variance", "critic/grad_norm",
    "rollout/length", "rollout/fault_rate", "rollout/cut_off", "rollout/repeated", "rollout/dead_groups",
    "sft/loss", "head/loss", "head/iou", "head/quality_loss", "tower/cell_loss", "tower/box_loss",
}  # fmt: skip
"""Scalars that the stages log; each reward term adds `reward/TERM`."""


class Train(Part):
    """Keys of `python -m segrl.train`."""

    name: Name
    seed: Seed
    init_from: Text | None
    ckpt_path: Text | None
    resume: Text | None
    test_before: bool
    objective_metric: Text | None
    sources: Sources
    stage: Annotated[Any, slot("stage")]
    policy: Annotated[Any, slot("policy")]
    reference: Annotated[Any, slot("reference")] | None
    head: Annotated[Any, slot("head")]
    grammar: Annotated[Any, slot("grammar")]
    reward: Annotated[Any, slot("reward")]
    rollout: Annotated[Any, slot("rollout")]
    data: Annotated[Any, slot("data")]
    trainer: Annotated[Any, slot("trainer")]
    policy_precision: PRECISIONS | None = None  # the policy group's; `trainer.precision` refers to it
    logger: Annotated[Any, slot("logger")]
    callbacks: Annotated[Any, slot("callback", "dict")]
    paths: Annotated[Any, slot("paths")]


class Evaluate(Train):
    """Keys of `python -m segrl.evaluate`."""

    model: Text | None
    suite: Annotated[Any, slot("suite")]
    scores: Annotated[Any, slot("scores")]
    testsets: Annotated[Any, slot("testset", "dict")]


class Score(Part):
    """Keys of `python -m segrl.score`."""

    pred: Text
    gt: Text
    keep: str
    metrics: METRICS | Annotated[list[METRICS], Field(min_length=1)] | None
    out: Text | None
    draws: int = Field(ge=0, le=1_000_000)
    seed: Seed
    scores: Annotated[Any, slot("scores")]


class Export(Part):
    """Keys of `python -m segrl.export`."""

    ckpt: Text
    out: Text


class Weights(Part):
    """Keys of a run's configuration that an export reads."""

    policy: Annotated[Any, slot("policy")]
    grammar: Annotated[Any, slot("grammar")]
    head: Annotated[Any, slot("head")]
    max_tokens: Tokens


class PrepareCheck(Part):
    """Keys of `python -m segrl.prepare check`."""

    name: Name
    seed: Seed
    out: Text | None
    threads: int = Field(ge=1, le=1024)
    sources: Sources
    policy: Annotated[Any, slot("policy")]
    policy_precision: PRECISIONS | None = None
    grammar: Annotated[Any, slot("grammar")]
    data: Annotated[Any, slot("data")] | None = None
    testsets: Annotated[Any, slot("testset", "dict")]
    paths: Annotated[Any, slot("paths")]


class PrepareTraces(Part):
    """Keys of `python -m segrl.prepare traces`."""

    name: Name
    seed: Seed
    out: Text
    overwrite: bool
    least_iou: Share
    sources: Sources
    policy: Annotated[Any, slot("policy")]
    policy_precision: PRECISIONS | None = None
    head: Annotated[Any, slot("head")]
    grammar: Annotated[Any, slot("grammar")]
    data: Annotated[Any, slot("data")]
    annotator: Annotated[Any, slot("trace")]
    paths: Annotated[Any, slot("paths")]


COMMANDS: dict[str, type[Part]] = {
    "train": Train, "evaluate": Evaluate, "score": Score, "export": Export,
    "prepare_check": PrepareCheck, "prepare_traces": PrepareTraces,
}  # fmt: skip


def together(cfg: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a key and an error message for each rule between two keys that a configuration breaks.

    Args:
        cfg: resolved; each value already fits its own field.
    """
    if "stage" in cfg and "suite" not in cfg:  # a training; an evaluation has `suite`
        yield from _divergence(cfg)
        yield from _batches(cfg)
        yield from _alarms(cfg)
    if "stage" in cfg:
        yield from _validation(cfg)
    for name, members in cfg.get("suite", {}).get("unions", {}).items():
        if lost := [one for one in members if one not in cfg["testsets"]]:
            yield f"suite.unions.{name}", f"must be a list of test sets of this suite; got {shown(lost[0])}"
    if isinstance(cfg.get("pred"), str) and cfg["metrics"] is not None and "metrics" not in cfg["scores"]:
        yield "metrics", "must be null with scores that have a fixed table (scores=referring)"


def _divergence(cfg: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check the KL weights, the reference and the mismatch cap against each other."""
    stage, reference = cfg["stage"], cfg["reference"]
    weight, reward = stage.get("kl_weight", 0), stage.get("kl_reward", 0)
    if weight > 0 and reward > 0:
        yield (
            "stage.kl_reward",
            "must be 0 if stage.kl_weight is positive: "
            "the divergence is added to the loss or to the reward, not to both; "
            f"got {reward}",
        )
    if weight + reward > 0 and reference is None and "reference" in stage:
        key, value = ("stage.kl_weight", weight) if weight > 0 else ("stage.kl_reward", reward)
        yield (
            key,
            f"must be 0 without a reference to measure a KL against (or reference=frozen_copy); got {value}",
        )
    own = str(cfg["rollout"]["_target_"]).endswith(".SharedPrefixEngine")
    if own and (cap := stage.get("mismatch_cap")) is not None:
        yield (
            "stage.mismatch_cap",
            "must be null if the policy itself samples, because there is no mismatch to correct; "
            f"got {cap} (rollout=vllm uses it)",
        )
    adapter = cfg["policy"].get("lora") is not None
    if (
        reference is not None
        and "reference" in stage
        and str(reference["_target_"]).endswith(".AdapterOff")
        and not adapter
    ):
        yield (
            "reference",
            "must be frozen_copy or none without policy.lora: "
            "adapter_off disables the LoRA adapter, and this policy has none",
        )


def _batches(cfg: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check that a batch divides evenly into updates, and max_steps into whole rollouts."""
    stage, batch, steps = cfg["stage"], cfg["data"]["batch_size"], cfg["trainer"]["max_steps"]
    live, cuts = stage.get("live_samples"), stage.get("updates_per_rollout", 1)
    if live is not None and live > batch:
        yield "stage.live_samples", f"must be at most data.batch_size ({batch}); got {live}"
    key, samples = ("data.batch_size", batch) if live is None else ("stage.live_samples", live)
    if samples % cuts:
        yield (
            key,
            f"must be a multiple of stage.updates_per_rollout ({cuts}), "
            f"so that no group is split; got {samples}",
        )
    updates = cuts * stage.get("epochs_per_rollout", 1)
    if steps > 0 and steps % updates:
        yield (
            "trainer.max_steps",
            f"must be a multiple of the {updates} updates that a rollout makes; got {steps}",
        )


def _validation(cfg: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check that monitored metrics belong to sets that are scored."""
    module = cfg["data"]["module"]
    val, test = module.get("val") or {}, module.get("test") or {}
    best = cfg["callbacks"].get("best") or {}
    scored = {"val": val, "test": {**(cfg.get("testsets") or test), **cfg.get("suite", {}).get("unions", {})}}
    compared = ("test",) if "suite" in cfg else ("test", "val")
    for key, wanted, splits in (
        ("callbacks.best.monitor", best.get("monitor"), ("val",)),
        ("objective_metric", cfg["objective_metric"], compared),
    ):
        names = [f"{split}/{name}" for split in splits for name in scored[split]]
        if wanted is not None and wanted.rpartition("/")[0] not in names:
            sets = ", ".join(f"{name}/METRIC" for name in names)
            yield (
                key,
                f"must be null{f' or one of {sets}' if sets else ': this dataset has no such set'}; "
                f"got {shown(wanted)}",
            )
    if cfg["trainer"]["val_check_interval"] is not None and not val:
        yield (
            "trainer.val_check_interval",
            "must be null without a validation set (data.module.val is empty)",
        )


def _alarms(cfg: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Check that each alarm watches a logged scalar and has a bound."""
    logged = SCALARS | {f"reward/{term}" for term in cfg["reward"].get("terms", {})}
    for name, rule in ((cfg["callbacks"].get("alarms") or {}).get("rules") or {}).items():
        key = f"callbacks.alarms.rules.{name}"
        if rule["scalar"] not in logged:
            yield f"{key}.scalar", f"must be one of {', '.join(sorted(logged))}; got {shown(rule['scalar'])}"
        if not rule.keys() & {"above", "below", "collapse", "explosion"}:
            yield key, "must have at least one of above, below, collapse and explosion; it has none"
