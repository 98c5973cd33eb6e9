"""List the parts that each place of a configuration may hold, by `_target_`, and the nodes without a part.

A configuration, or the card of exported weights, can name no other part of segrl.
"""

from __future__ import annotations

from segrl.runs.schema import around, parts, stages
from segrl.runs.schema.kinds import Part
from segrl.runs.schema.parts import Nothing


def _in(module: str, **models: type[Part]) -> dict[str, type[Part]]:
    """Return models of one module of segrl by the full dotted names of their parts."""
    return {f"segrl.{module}.{name}": model for name, model in models.items()}


_VALUE = "models.value_head"

PARTS: dict[str, dict[str, type[Part]]] = {
    "stage": {
        **_in("stages.grpo", GRPOStage=stages.GRPO),
        **_in("stages.ppo", PPOStage=stages.PPO),
        **_in("stages.sft", SFTStage=stages.SFT),
        **_in("nano.tower", TowerStage=stages.Tower),
        **_in("nano.mask_head", MaskHeadStage=stages.MaskHead),
    },
    "optimizer": {"torch.optim.AdamW": stages.AdamW},
    "schedule": _in("stages.schedule", one_cycle=stages.OneCycle),
    "surrogate": _in(
        "objectives.clipped",
        ppo_clip=stages.PPOClip, gspo_clip=stages.Bounds, cispo_clip=stages.Bounds,
    ),
    "token_weights": _in(
        "objectives.masked",
        per_sequence=Nothing, per_token=Nothing, per_group=Nothing, per_budget=stages.Budget,
    ),
    "divergence": _in("objectives.kl", k1=Nothing, k2=Nothing, k3=Nothing),
    "advantage": _in(
        "objectives.advantages",
        group_relative=stages.Relative, group_centred=Nothing, leave_one_out=Nothing,
        batch_normalised=stages.Relative,
    ),
    "critic": _in(
        _VALUE,
        DetachedCritic=stages.Critic, SharedCritic=stages.Critic, AdapterCritic=stages.AdapterCritic,
    ),
    "decay": _in("objectives.gae", constant_decay=stages.Decay, segment_decay=stages.Decay),
    "shaping": _in("rollout.shaping", PromptShaping=stages.Shaping),
    "potential": {
        **_in("metrics.functional.overlap", iou=Nothing),
        **_in("rewards.mask", tiered_potential=parts.Tiered),
    },
    "policy": _in("models.hf_vlm", HFPolicy=parts.HFPolicy),
    "reference": _in("models.reference", FrozenCopy=Nothing, AdapterOff=Nothing),
    "head": _in("models.sam2_head", Sam2Head=parts.Sam2Head),
    "grammar": {
        **_in("prompts.tags", SegR1Tags=parts.Tags, SegR1Points=parts.Points),
        **_in("prompts.released", SegR1Released=parts.Tags),
        **_in(
            "prompts.answer_json",
            SamR1Json=parts.Points, SegZeroJson=parts.Asking, VisionReasonerJson=parts.Boxes,
        ),
    },
    "reward": _in("rewards.mixture", RewardMixture=parts.RewardMixture),
    "fn": {
        **_in(
            "rewards.mask",
            iou=Nothing, structure=Nothing, binary=parts.Threshold, tiered=parts.Tiered,
            segment_as_published=Nothing, Quantile=parts.Quantile,
        ),
        **_in(
            "rewards.text",
            well_formed=Nothing, objects_formed=Nothing, parses=Nothing, reasoned=Nothing,
            unrepeated=Nothing, overlong=parts.Overlong, point_count=parts.PointCount,
        ),
        **_in(
            "rewards.geometry",
            box_overlaps=parts.Threshold, box_is_near=parts.Tolerance, points_are_near=parts.Tolerance,
            matched=parts.Matched,
        ),
    },
    "rollout": {
        **_in("rollout.shared_prefix", SharedPrefixEngine=parts.SharedPrefix),
        **_in("rollout.vllm", VLLMEngine=parts.VLLM),
        **_in("rollout.vllm_server", VLLMServer=parts.VLLMServer),
    },
    "module": _in("data.datamodule", SegDataModule=parts.Module),
    "samples": {
        **_in("data.image_mask", ImageMaskFolders=parts.Folders),
        **_in("data.jsonl", JsonlDataset=parts.Listed),
        **_in("data.reasoning", ReasonSeg=parts.ReasonSeg),
        **_in("data.referring", ReferringExpressions=parts.Referring),
        **_in("data.synthetic", SyntheticScenes=parts.Scenes),
        **_in("data.chat_traces", ChatTraces=parts.Traces),
    },
    "trace": {
        **_in("data.annotator", Annotator=parts.Annotator),
        **_in("data.chat_traces", AsWritten=Nothing),
    },
    "callback": {
        **_in(
            "tracking.callbacks",
            Progress=around.Progress, History=around.InFolder, SampleSheets=around.Sheets,
        ),
        **_in("tracking.checkpoints", EveryNSteps=around.EveryNSteps, KeepBest=around.KeepBest),
        **_in("tracking.alarms", Alarms=around.Alarms),
    },
    "logger": _in("tracking.mlflow_runs", open_logger=around.Tracked, open_csv=Nothing),
    "trainer": {"lightning.Trainer": around.Trainer},
    "strategy": _in("stages.zero", ZeRO=around.ZeRO),
    "scores": {
        **_in("metrics.saliency", Saliency=around.Saliency),
        **_in("metrics.referring", Referring=around.ReferringScores),
    },
}  # fmt: skip
"""Place to the parts that may stand there: full dotted name to the model of its keys."""

SHAPES: dict[str, type[Part]] = {
    "lora": parts.Lora, "term": parts.Term, "rule": around.Rule, "folder": parts.FolderPair,
    "exclusion": parts.Exclusion, "data": parts.Data, "testset": parts.TestSet, "paths": parts.Paths,
    "suite": around.Suite,
}  # fmt: skip
"""Nodes without a `_target_`, by place."""

PARTIAL = {
    "optimizer", "schedule", "surrogate", "token_weights", "divergence", "advantage", "critic", "decay",
    "potential", "reference", "logger",
}  # fmt: skip
"""Places whose part needs `_partial_: true`, because segrl calls it later with more arguments."""

OTHERS: dict[str, tuple[str, type[Part]]] = {
    "optimizer": ("torch.optim.", stages.AnyOptimizer),
    "schedule": ("torch.optim.lr_scheduler.", stages.AnyTorch),
}  # fmt: skip
"""Places that also take any part of a library: prefix of its name, and the model of its keys."""


def known(target: str, place: str) -> type[Part] | None:
    """Return the model of a part's keys, or None if segrl knows no such part for the place."""
    if (model := PARTS[place].get(target)) is not None:
        return model
    if place not in OTHERS:
        return None
    prefix, other = OTHERS[place]
    return other if target.startswith(prefix) and target.removeprefix(prefix).isidentifier() else None
