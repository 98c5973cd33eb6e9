"""A configuration from elsewhere is data: it names segrl's parts and plain values, or is refused.

It is refused before anything of it is called.
"""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from segrl.host.foreign import strange
from segrl.runs.configuration import compose_job, register_resolvers
from segrl.runs.export import _own
from segrl.runs.resuming import read, resumed, saved
from segrl.track import configuration


@pytest.fixture(scope="module")
def config() -> str:
    register_resolvers()
    return OmegaConf.to_yaml(compose_job("train", ["+experiment=demo", "paths.run=runs/demo/1"]))


def run_of(tmp_path: Path, config: str, key: str | None = None, value: object = None) -> Path:
    """Return a run's folder with one key of its configuration changed."""
    cfg = OmegaConf.create(config)
    if key is not None:
        OmegaConf.update(cfg, key, value, force_add=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"not read here")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    return tmp_path


def again(folder: Path, *overrides: str):
    return resumed(OmegaConf.create({"resume": str(folder)}), [f"resume={folder}", *overrides])


def test_an_honest_run_goes_on(tmp_path, config):
    cfg = again(run_of(tmp_path, config), "++trainer.max_steps=500")
    assert cfg.trainer.max_steps == 500 and cfg.paths.run == str(tmp_path)


TRAP = {"_target_": "os.system", "command": "touch trapped"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy._target_", "os.system"), ("policy._target_", "builtins.exec"),
        ("policy._target_", "hydra.utils.get_method"),
        ("policy._target_", "segrl.models.policy_card.importlib.import_module"),
        ("stage.optimizer._target_", "torch.hub.load"),
        ("stage.optimizer._target_", "torch.optim.adamw.torch.hub.load"),
        ("stage.schedule._target_", "torch.optim.lr_scheduler.os.system"),
        ("trainer._target_", "lightning.pytorch.cli.os.system"), ("trainer.strategy", TRAP),
        ("trainer.extra", TRAP),
        ("stage.extra", TRAP),
        ("stage.optimizer", {"_target_": "torch.optim.SGD", "lr": 0.1, "_partial_": True, "extra": TRAP}),
        ("stage.optimizer", {"_target_": "torch.optim.SGD", "lr": 0.1, "_partial_": True, "extra": [TRAP]}),
        ("data.module.train", TRAP), ("data.module.test.mine", TRAP), ("data.extra", TRAP),
        ("data.published", {"a": TRAP}),
        ("reward.terms.mine", {"fn": {**TRAP, "_partial_": True}, "weight": 1.0}),
        ("reward.terms.iou.fn._target_", "shutil.rmtree"),
        ("callbacks.mine", TRAP), ("logger", {**TRAP, "_partial_": True}),
        ("head._target_", "subprocess.run"),
        ("head.architecture", "evil.yaml"), ("head.architecture", "configs/sam2.1/../../evil.yaml"),
        ("sources", {"a": TRAP}),
        ("name", "${oc.env:HOME}"), ("paths.runs", "${oc.decode:1}"),
        ("policy.weights", "${hydra:runtime.cwd}"),
        ("policy._args_", [1]), ("policy._recursive_", False), ("policy._convert_", "all"),
        ("stage.policy", TRAP),
        ("grammar.instructions", {"a": {"b": "${reward}"}}), ("grammar.instructions", {"a": "${policy}"}),
        ("stage.surrogate._target_", "segrl.stages.grpo.GRPOStage"), ("stage.critic", TRAP), ("hydra", TRAP),
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_run_is_refused_in_a_line(tmp_path, config, key, value):
    folder = run_of(tmp_path, config, key, value)
    with pytest.raises(ValueError, match="resume: ") as refused:
        again(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    assert not Path("trapped").exists()


def test_own_code_must_be_named_on_the_command_line(tmp_path, config):
    folder = run_of(tmp_path, config, "reward.terms.iou.fn._target_", "statistics.fmean")
    with pytest.raises(
        ValueError, match=r"reward\.terms\.iou\.fn\._target_=statistics\.fmean on the command line"
    ):
        again(folder)
    assert (
        again(folder, "++reward.terms.iou.fn._target_=statistics.fmean").reward.terms.iou.fn._target_
        == "statistics.fmean"
    )


def test_an_evaluation_with_own_code_resumes_if_it_is_named(tmp_path):
    register_resolvers()
    cfg = compose_job("evaluate", ["+suite=synthetic", "scores._target_=builtins.dict"])
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    given = (tmp_path / "config.yaml", "resume", "evaluate")
    with pytest.raises(ValueError, match=r"scores\._target_=builtins\.dict on the command line\)$"):
        saved(*given)
    assert saved(*given, ["scores._target_=builtins.dict"]).scores._target_ == "builtins.dict"
    for other in ("scores._target_=builtins.list", "suite.draws=3"):
        with pytest.raises(ValueError, match=f"must keep the configuration of the evaluation; {other} "):
            saved(*given, [other])


def test_an_export_is_made_of_segrls_parts_and_describes_the_others(tmp_path, config):
    own = run_of(tmp_path, config, "reward.terms.iou.fn._target_", "nobodys.module.area") / "config.yaml"
    cfg = read(own, "ckpt")
    cfg.rollout = {"_target_": "nobodys.Engine", "max_tokens": 7}
    made = _own(cfg, own)
    assert made.policy == cfg.policy and made.max_tokens == 7
    cfg.policy._target_ = "nobodys.Policy"
    with pytest.raises(
        ValueError, match=r"^ckpt: .*policy\._target_: must be a part of segrl.* got nobodys\.Policy$"
    ):
        _own(cfg, own)


@pytest.mark.parametrize(
    "change",
    [
        {"grammar": {"instructions": "${reward.trap}"}}, {"policy": {"lora": "${reward.trap}"}},
        {"policy": "${reward.trap}"}, {"grammar": "${reward.trap}"}, {"policy": {"mine": "${reward.trap}"}},
        {"policy": {"temperature": "${reward}"}},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_that_is_only_described_is_called_by_an_export(tmp_path, config, change):
    folder = run_of(tmp_path, config, "reward.trap", TRAP)
    cfg = read(folder / "config.yaml", "ckpt")
    for part, value in change.items():
        cfg[part] = OmegaConf.merge(cfg[part], value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=r"^ckpt: .* must be a configuration of "):
        _own(cfg, folder / "config.yaml")


@pytest.mark.parametrize("change", ["stage.critic_lr=1", "++stage.critic_lr=1", "trainer.max_steps.more=1"])
def test_what_cannot_be_changed_is_refused(tmp_path, config, change):
    folder = run_of(tmp_path, config, "stage.critic_lr", 1e-5)
    with pytest.raises(ValueError, match=r"^resume: .* cannot be changed$"):
        again(folder, change)


def test_a_value_that_nothing_reads_is_refused_and_one_that_changes_nothing_is_not(tmp_path):
    """Supervised learning reads no reward."""
    register_resolvers()
    cfg = compose_job("train", ["+experiment=nano_sft", "paths.run=runs/sft/1"])
    folder = run_of(tmp_path, OmegaConf.to_yaml(cfg), "reward.terms.iou.fn._target_", "statistics.fmean")
    held = "reward.terms.iou.fn._target_=statistics.fmean"
    assert again(folder, held).name == cfg.name
    with pytest.raises(ValueError, match=r"reward\.terms\.iou\.weight: must not be set for SFTStage"):
        saved(folder / "config.yaml", "resume", "train", ["reward.terms.iou.weight=2.0", held])


def test_values_are_read_as_hydra_reads_them(tmp_path, config):
    folder = run_of(tmp_path, config)
    assert again(folder, "paths.weights=a: b").paths.weights == "a: b"
    assert again(folder, "paths.weights='2024_01'").paths.weights == "2024_01"
    assert again(folder, "trainer.max_steps=400").trainer.max_steps == 400


def test_a_run_whose_schedule_named_its_peak_goes_on(tmp_path, config):
    rate = OmegaConf.create(config).stage.optimizer.lr
    for value in ("${stage.optimizer.lr}", rate):
        folder = tmp_path / f"{value}".strip("${}")
        folder.mkdir()
        run = run_of(folder, config, "stage.schedule.max_lr", value)
        assert "max_lr" not in again(run).stage.schedule
    with pytest.raises(
        ValueError, match=r"stage\.schedule\.max_lr must be stage\.optimizer\.lr .* got 7\.0 "
    ):
        again(run_of(tmp_path, config, "stage.schedule.max_lr", 7.0))


@pytest.mark.parametrize(
    ("steps", "best", "anew"),
    [([], False, True), ([1, 2, 3], False, True), ([1, 2, 3, 4], False, False), ([1], True, False)]
)  # fmt: skip
def test_a_run_whose_checkpoint_is_gone_does_not_begin_anew(tmp_path, config, capsys, steps, best, anew):
    """A kill may have kept the third update from being saved."""
    folder = run_of(tmp_path, config, "callbacks.checkpoint.every_n_steps", 3)
    (folder / "checkpoints" / "last.ckpt").unlink()
    (folder / "history.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    if best:
        (folder / "checkpoints" / "best.ckpt").write_bytes(b"")
    if anew:
        assert again(folder, "callbacks.checkpoint.every_n_steps=2").ckpt_path is None
        assert capsys.readouterr().out.endswith("starts again at its first update\n")
    else:
        with pytest.raises(ValueError, match=r"^resume: .*last\.ckpt is missing"):
            again(folder, "callbacks.checkpoint.every_n_steps=100")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe",
        b"a: [1",
        b"- 1\n- 2\n",
        b"just words",
        b"name: !!python/object/apply:os.system ['touch trapped']\n",
        b"seed: 1\n",
    ],
)
def test_a_damaged_configuration_is_refused_in_a_line(tmp_path, config, content):
    folder = run_of(tmp_path, config)
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="resume: ") as refused:
        again(folder)
    assert "\n" not in str(refused.value)


def test_an_evaluation_goes_on_with_plain_values_alone(tmp_path):
    register_resolvers()
    cfg = compose_job("evaluate", ["+suite=synthetic"])
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert saved(tmp_path / "config.yaml", "resume", "evaluate").suite.name == "synthetic"
    cfg.scores._target_ = "os.system"
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"scores\._target_"):
        saved(tmp_path / "config.yaml", "resume", "evaluate")


def test_what_is_tracked_looks_nothing_up(tmp_path, config):
    folder = run_of(tmp_path, config)
    assert configuration(folder)["name"] == "demo"
    for value in ("${oc.env:HOME}", "${oc.decode:1}"):
        OmegaConf.save(OmegaConf.merge(OmegaConf.create(config), {"name": value}), folder / "config.yaml")
        with pytest.raises(ValueError, match=r"^RUN: .* must hold plain values .* name is "):
            configuration(folder)


def test_an_architecture_names_parts_of_sam2_alone(tmp_path):
    from segrl.models.sam2_head import Sam2Head

    for text in (
        "model: {_target_: os.system, command: touch trapped}",
        "model: {_target_: sam2.build_sam.os.getcwd}",
        "model: {a: '${oc.env:HOME}'}",
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"head\.architecture: "):
            Sam2Head(str(tmp_path / "a.yaml"), None, 1, 1, None)


def test_calls_and_lookups_are_strange_and_plain_values_are_not():
    assert not list(
        strange(
            {"a": [1, 2.5, None, True, "x"], "b": {"c": "${a}/x", "_target_": "t", "_partial_": True}},
            whole=True,
        )
    )
    for node in ({"a": "${oc.env:X}"}, {"a": ["${a.${b}}"]}, {"_args_": []}, {"a": b"x"}, {"a": "${eval:1}"}):
        assert list(strange(node, whole=True)), node
    for node in ({"a": "${b}"}, {"b": {"_target_": "x"}}):
        assert list(strange(node, whole=False)), node


@pytest.mark.parametrize(
    "parts",
    [{"a": "$", "b": "${a}{oc.env:HOME}"}, {"a": "{oc.env:HOME}", "b": "$${a}"}, {"a": "x$", "b": "y"}],
)
def test_values_that_join_to_a_reference_are_strange(parts):
    """A called node reads a value once more after its references are resolved."""
    assert list(strange(parts, whole=True))
    assert not list(strange({"a": "for $5 {each}", "b": "${a}/$a"}, whole=True))
