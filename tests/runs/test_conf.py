"""Every experiment composes, and every node of it binds to its constructor; no weights are loaded."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from segrl.runs.assembly import composites
from segrl.runs.configuration import check_keys, conf_folder, experiment_first, register_resolvers
from segrl.runs.resuming import saved

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
        for name, composite in (composites(made) if path == "stage" else {}).items():
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
        cfg = composed(f"{'+' * (group == 'adapter')}{group}={option}")
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


def plain(cfg, *without):
    """A configuration as resolved data, without some top-level keys."""
    return {
        key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key not in without
    }


@pytest.mark.parametrize("experiment", ["grpo_cod10k", "prerl_dis5k", "sod_duts"])
def test_the_adapter_makes_any_experiment_its_lora_variant_in_either_order(experiment):
    where = ("name=x", "paths.run=x")
    named = composed(f"+experiment={experiment}_lora", *where)
    chosen = [f"+experiment={experiment}", "+adapter=lora"]
    for arguments in (chosen, chosen[::-1]):
        assert plain(composed(*experiment_first(arguments), *where)) == plain(named)
    assert named.policy.lora == {"rank": 64, "alpha": 64, "dropout": 0.0}
    assert (named.policy.train_vision, named.policy.gradient_checkpointing) == (False, True)
    assert (named.policy.dtype, named.stage.optimizer.lr) == ("bfloat16", 1e-5)
    assert named.reference._target_.endswith("AdapterOff") and named.rollout.prefixes_at_once == 8
    # Hydra's own rule, for which `experiment_first` exists
    assert composed(*chosen[::-1]).reference._target_.endswith("FrozenCopy")


def test_the_lora_variants_that_differ_in_a_group_say_so():
    assert composed("+experiment=sam_r1_refcocog_lora").policy.weights.endswith("Qwen2.5-VL-3B-Instruct")
    assert composed("+experiment=sam_r1_refcocog", "+adapter=lora").policy.weights.endswith("VL-7B-Instruct")
    sft = composed("+experiment=sft_fcot_lora")
    assert sft.reference is None and sft.rollout.prefixes_at_once is None and sft.policy.lora.rank == 64


def test_an_adapter_moves_no_argument_but_itself():
    flags = ["-m", "+adapter=lora", "seed=1,2", "+experiment=demo", "name=x"]
    assert experiment_first(flags) == ["-m", "seed=1,2", "+experiment=demo", "+adapter=lora", "name=x"]
    assert experiment_first(["+adapter=lora", "seed=1"]) == ["+adapter=lora", "seed=1"]


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ([], "32-true"),
        (["policy=qwen2_5_vl_3b", "trainer=ddp"], "bf16-mixed"),
        (["trainer=ddp", "policy=qwen2_5_vl_3b"], "bf16-mixed"),
        (["trainer.precision=32-true", "policy=qwen2_5_vl_3b"], "32-true"),
        (["+experiment=grpo_cod10k", "policy=nano"], "32-true"),
        (["~policy_precision", "policy=qwen2_5_vl_3b"], "32-true"),  # as for a policy of a user's own
    ],
)
def test_the_policy_says_which_precision_the_trainer_has_unless_it_is_set(overrides, precision):
    assert composed(*overrides).trainer.precision == precision


WITH_SETS = {
    "duts": "duts_te", "fcot": "duts_te", "dis5k": "dis_vd", "cod10k_camo": "cod10k",
    "refcocog": "refcocog_val", "grefcoco": "grefcoco_val", "reasonseg": "reasonseg_val",
}  # fmt: skip


@pytest.mark.parametrize(("data", "name"), WITH_SETS.items())
def test_a_dataset_scores_the_test_set_that_an_evaluation_scores(data, name):
    """Only the folder differs: data.root there, testsets.NAME.root here."""
    cfg = composed(f"data={data}", "data.root=X")
    root = "X/COD10K-v3" if data == "cod10k_camo" else "X"
    alone = composed(f"+testset={name}", f"testsets.{name}.root={root}", config="evaluate")
    assert plain(cfg.data.module.test) == {name: plain(alone.testsets[name].samples)}
    assert plain(cfg.data.published)[name] == alone.testsets[name].published
    assert "X" in str(plain(cfg.data.module.train)) or data == "fcot"


def test_an_evaluation_scores_the_sets_that_are_asked_for_alone():
    cfg = composed("+experiment=sod_duts", "+testset=camo", config="evaluate")
    assert set(cfg.testsets) == {"camo"} and set(cfg.data.testsets) == {"duts_te"}


@pytest.mark.parametrize("experiment", ["sod_duts", "vision_reasoner_multi"])
def test_a_run_saved_before_test_sets_and_precision_were_references_is_resumed(tmp_path, experiment):
    now = composed(f"+experiment={experiment}")
    old, values = OmegaConf.to_container(now, resolve=False), plain(now)
    del old["data"]["testsets"], old["policy_precision"]
    for key in ("published", "licence"):
        old["data"][key] = values["data"][key]
    old["data"]["module"]["test"] = values["data"]["module"]["test"]
    old["sources"], old["trainer"]["precision"] = values["sources"], values["trainer"]["precision"]
    OmegaConf.save(OmegaConf.create(old), tmp_path / "config.yaml")
    loaded = saved(tmp_path / "config.yaml", "resume", "train", ["trainer.precision=32-true"])
    assert loaded.trainer.precision == "32-true"
    OmegaConf.save(composed(f"+experiment={experiment}"), tmp_path / "config.yaml")  # and one saved today
    loaded = saved(tmp_path / "config.yaml", "resume", "train")
    assert (
        loaded.trainer.precision == "bf16-mixed"
        and plain(loaded.data.module.test) == old["data"]["module"]["test"]
    )


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
