"""Every experiment composes, and every node of it binds to its constructor; no weights are loaded."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from segrl.runs.assembly import composites
from segrl.runs.configuration import check_keys, conf_folder, register_resolvers

EXPERIMENTS = sorted(p.stem for p in (conf_folder() / "experiment").glob("*.yaml"))


def composed(*overrides, config="train"):
    register_resolvers()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config, list(overrides))


def targets(node, path=""):
    """Return every node with a constructor."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets(value, f"{path}[{i}]")


def bind(path, node):
    keywords = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    made = get_object(node["_target_"])
    try:
        for name, composite in composites(made).items():
            inner = {f.name: keywords.pop(f.name) for f in fields(composite) if f.name in keywords}
            keywords[name] = inspect.signature(composite).bind(**inner)
        signature = inspect.signature(made)
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**keywords)
    except TypeError as error:
        raise AssertionError(f"{path}: {node['_target_']}: {error}") from None


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_and_binds(experiment):
    config = composed(f"+experiment={experiment}")
    check_keys(config)
    cfg = OmegaConf.to_container(config, resolve=True)
    nodes = list(targets(cfg))
    assert {"stage", "policy", "head", "grammar", "reward", "rollout", "data.module", "trainer"} <= {
        p for p, _ in nodes
    }
    for path, node in nodes:
        bind(path, node)


@pytest.mark.parametrize(
    "file", sorted(conf_folder().glob("*/[!_]*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}"
)
def test_every_option_of_every_group_composes_and_binds(file: Path):
    if file.parent.name in ("experiment", "testset"):  # test sets are read in tests/data/test_testsets.py
        return
    group, option = file.parent.name, file.stem
    if group in ("suite", "scores"):  # of evaluation alone
        cfg = composed(f"{'+' * (group == 'suite')}{group}={option}", config="evaluate")
        check_keys(cfg, "evaluate")
    else:
        cfg = composed(f"{group}={option}")
    for path, node in targets(OmegaConf.to_container(cfg, resolve=False)):
        if path.split(".")[0] in (group, "testsets", "scores"):
            bind(path, node)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("rollout", sorted(p.stem for p in (conf_folder() / "rollout").glob("*.yaml")))
def test_every_experiment_takes_every_rollout(experiment: str, rollout: str):
    cfg = composed(f"+experiment={experiment}", f"rollout={rollout}")
    bind("rollout", OmegaConf.to_container(cfg.rollout, resolve=False))


def test_binding_would_notice_a_key_that_no_constructor_takes():
    with pytest.raises(AssertionError, match="temprature"):
        bind("policy", {"_target_": "segrl.prompts.tags.SegR1Points", "max_points": 3, "temprature": 1})


def test_grpo_cod10k_is_the_papers_run():
    cfg = composed("+experiment=grpo_cod10k")
    assert cfg.stage._target_.endswith("GRPOStage")
    assert (cfg.stage.group_size, cfg.stage.optimizer.lr, cfg.stage.kl_weight) == (4, 1e-6, 0.04)
    assert (cfg.trainer.max_epochs, cfg.data.batch_size, cfg.rollout.max_tokens) == (2, 24, 400)
    assert cfg.policy.weights.endswith("Qwen2.5-VL-3B-Instruct") and cfg.policy.temperature == 1.0
    assert (cfg.policy.dtype, cfg.trainer.precision) == (
        "float32",
        "bf16-mixed",
    )  # master weights, as ZeRO-1 keeps them
    assert composed("+experiment=grpo_cod10k", "policy=nano").trainer.precision == "32-true"
    assert cfg.head.architecture == "configs/sam2.1/sam2.1_hiera_l.yaml"
    assert {name: term.weight for name, term in cfg.reward.terms.items()} == {
        "iou": 0.7,
        "structure": 0.3,
        "format": 1.0,
    }
    assert cfg.stage.updates_per_rollout * cfg.stage.epochs_per_rollout == 1
    assert [f.images for f in cfg.data.train_folders] == [
        "COD10K-v3/Train/Image",
        "CAMO-V.1.0-CVIU2019/Images/Train",
    ]


def test_the_stages_of_seg_r1_are_one_class():
    stages = {
        composed(f"+experiment={e}").stage._target_
        for e in ("prerl_dis5k", "grpo_cod10k", "sod_duts", "demo")
    }
    assert stages == {"segrl.stages.grpo.GRPOStage"}


def test_experiment_values_beat_group_values_and_the_command_line_beats_both():
    assert composed("+experiment=demo").stage.group_size == 8
    assert composed("+experiment=demo", "stage.group_size=6").stage.group_size == 6
    assert composed(
        "+experiment=demo", "reward.terms.iou.weight=0.5", "~reward.terms.format"
    ).reward.terms.keys() == {"iou", "structure"}
