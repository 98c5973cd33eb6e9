"""A user's mistake costs one line, exit code 2, and nothing on the disk."""

import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

DEMO = (
    "+experiment=demo",
    "logger=csv",
    "data.workers=0",
    "trainer.max_steps=1",
    "data.batch_size=2",
    "data.test_length=2",
)


def refused(cli, tmp_path, *arguments):
    """Return the one line of a refused command, after checking that nothing was written."""
    before = sorted(p for p in tmp_path.rglob("*"))
    code, out, err = cli(*arguments)
    assert code == 2, (code, out, err)
    lines = [line for line in err.splitlines() if line.startswith("segrl: ")]
    assert len(lines) == 1 and err.strip() == lines[0], err
    assert "Traceback" not in err
    assert sorted(p for p in tmp_path.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage.group_sise=4", ["stage.group_sise", "stage.group_size"]),
        ("stage.optimizer.lrr=1", ["stage.optimizer.lrr", "stage.optimizer.lr"]),
        ("stage.lrr=1", ["stage.lrr", "did you mean stage.optimizer.lr?"]),
        ("polcy.temperature=1", ["polcy", "policy"]),
        ("policy=nanno", ["policy=nanno", "nano"]),
        ("+experiment=demoo", ["demoo", "demo"]),
        ("stage.group_size=1", ["stage.group_size", "2", "got 1"]),
        ("stage.group_size=four", ["stage.group_size", "four"]),
        ("stage.optimizer.lr=-1", ["stage.optimizer.lr", "-1"]),
        ("policy.temperature=0", ["policy.temperature", "0"]),
        ("reward.terms.iou.weight=0", ["reward.terms.iou.weight", "0"]),
        ("data.batch_size=0", ["data.batch_size", "0"]),
        ("seed=-3", ["seed", "-3"]),
        ("policy.gradient_checkpointing=fals", ["policy.gradient_checkpointing", "fals"]),
        ("rollout.prefixes_at_once=0", ["rollout.prefixes_at_once", "0"]),
        ("trainer.precision=fp8", ["trainer.precision", "bf16-mixed", "fp8"]),
        ("+colour=red", ["colour"]),
        ("+stage.momentum=0.9", ["stage.momentum"]),
        ("ckpt_path=nowhere.ckpt", ["ckpt_path", "nowhere.ckpt"]),
        ("init_from=nowhere.ckpt", ["init_from", "nowhere.ckpt"]),
        ("resume=nowhere", ["resume", "nowhere"]),
        ("data.contrast=[0.9,0.1]", ["data.contrast", "0.9"]),
        ("stage.kl_weight=0.1", ["reference", "0.1"]),
        ("objective_metric=test/synthetic/iuo", ["objective_metric", "test/synthetic/iou"]),
        ("head.checkpoint=nowhere.safetensors", ["head.checkpoint", "nowhere.safetensors"]),
        ("policy.weights=nowhere", ["policy.weights", "nowhere"]),
        ("data.batch_size=2000000", ["data.batch_size", "1000000"]),
        ("stage.updates_per_rollout=2 trainer.max_steps=3",
         ["trainer.max_steps", "multiple of the 2", "got 3"]),
        ("trainer.max_steps=0", ["trainer.max_steps", "got 0"]),
        ("experiment=demo", ["+experiment"]),
        ("stage=dapo stage.live_samples=0", ["stage.live_samples", "0"]),
        ("stage=dapo stage.live_samples=4", ["stage.live_samples", "2", "got 4"]),
        ("trainer.accelerator=gpu", ["trainer"]),
        ("policy.lora={rank:2,alpha:2,dropout:0.1}", ["policy.lora.dropout", "0.1"]),
        ("stage.surrogate.high=0.3",
         ["stage.surrogate.high", "one update per rollout", "stage.updates_per_rollout=2"]),
        ("name=${name}", ["must not refer to itself", "name -> name"]),
        ("name=a${seed} seed=${name}", ["must not refer to itself", "name -> seed -> name"]),
        ("stage.optimizer=${stage}", ["must not refer to itself", "stage -> stage"]),
        ("seed=${name} name=${seed}", ["must not refer to itself", "name -> seed -> name"]),
        ("stage.updates_per_rollout=3", ["data.batch_size", "stage.updates_per_rollout", "2"]),
        ("reward=seg_zero grammar=seg_r1_points", ["reward.terms.reasoning", "thought", "SegR1Points"]),
        ("stage=ppo_dense reference=frozen_copy grammar=seg_r1_points trainer.max_steps=2",
         ["stage.shaping", "steps", "SegR1Points"]),
        ("stage.kl_weight=0.1 stage.kl_reward=0.1 reference=frozen_copy", ["stage.kl_reward", "not to both"]),
        ("reference=adapter_off stage.kl_weight=0.1", ["reference", "policy.lora"]),
        ("callbacks.best.monitor=val/x/iou trainer.max_steps=1 trainer.val_check_interval=1",
         ["callbacks.best.monitor"]),
    ],
)  # fmt: skip
def test_one_line_names_the_key(cli, tmp_path, override, words):
    arguments = (override,) if "experiment=" in override else (*DEMO, *override.split())
    line = refused(cli, tmp_path, *arguments)
    for word in words:
        assert word in line, line


def test_a_folder_named_by_a_number_is_a_folder(cli, tmp_path):
    for key, arguments in {
        "pred": ("score", "pred=1", "gt=2024_01"),
        "data.root": ("evaluate", "data=image_mask", "data.root=1e3"), "ckpt": ("export", "ckpt=5", "out=6"),
        "resume": ("train", "resume=2024_01"),
    }.items():  # fmt: skip
        code, _, err = cli(*arguments[1:], module=arguments[0], runs=None)
        assert code == 2 and err.startswith(f"segrl: {key}: ") and err.count("\n") == 1
        assert arguments[1].split("=")[1] in err or arguments[2].split("=")[1] in err, err


def test_own_options_are_found_listed_and_swept(cli, tmp_path, monkeypatch):
    own = tmp_path / "own" / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "birds.yaml").write_text("# @package _global_\ndefaults: [demo]\nname: birds\n")
    place = ("--config-dir", str(own.parent))
    for arguments in (
        (*place, "+experiment=bird"),
        (f"hydra.searchpath=[file://{own.parent}]", "+experiment=bird"),
    ):
        line = refused(cli, tmp_path, *arguments)
        assert "did you mean birds?" in line and "demo" in line
    assert "got 1" in refused(cli, tmp_path, *place, "-m", "+experiment=birds", "stage.group_size=1,4")


@pytest.mark.parametrize(
    ("override", "word"), [("stage.group_sise=2,4", "stage.group_size"), ("stage.group_size=4,1", "got 1")]
)
def test_a_sweep_with_one_bad_job_is_refused_before_the_first(cli, tmp_path, override, word):
    assert word in refused(cli, tmp_path, "-m", *DEMO, override)


def test_missing_weights_and_data_are_named_with_their_owners(cli, tmp_path):
    code, _, err = cli("+experiment=grpo_cod10k")
    first, *lines = err.splitlines()
    assert (
        code == 2
        and first.startswith("segrl: 3 files or folders are missing")
        and len(lines) == 3
        and not list(tmp_path.iterdir())
    )
    assert (
        "policy.weights: " in lines[0]
        and "hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir weights/" in lines[0]
    )
    assert (
        "head.checkpoint: " in lines[1]
        and "curl -L --create-dirs -o weights/sam2.1_hiera_large.pt https://" in lines[1]
    )
    assert "data.root: " in lines[2] and "SINet" in lines[2]
    line = refused(cli, tmp_path, "+experiment=grpo_cod10k", "policy=nano", "head=sam2_nano")
    assert "data.root" in line and "SINet" in line


def test_an_empty_folder_and_an_empty_file_are_missing(cli, tmp_path):
    (tmp_path / "weights" / "Qwen2.5-VL-3B-Instruct").mkdir(parents=True)
    (tmp_path / "weights" / "sam2.1_hiera_large.pt").touch()
    code, _, err = cli("+experiment=grpo_cod10k")
    assert code == 2 and "Qwen2.5-VL-3B-Instruct is empty" in err and "sam2.1_hiera_large.pt is empty" in err


def dataset(root, images=("a", "b", "c"), masks=("a", "b", "c"), size=(40, 30), mask_size=None):
    for part in ("train", "test"):
        for kind, names, shape in (("images", images, size), ("masks", masks, mask_size or size)):
            folder = root / part / kind
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                pixels = np.zeros((shape[1], shape[0]), np.uint8)
                pixels[5:20, 8:25] = 255
                mode = Image.fromarray(pixels).convert("RGB") if kind == "images" else Image.fromarray(pixels)
                mode.save(folder / f"{name}.{'jpg' if kind == 'images' else 'png'}")
    return root


OWN = (
    "+experiment=demo",
    "data=image_mask",
    "objective_metric=null",
    "logger=csv",
    "data.workers=0",
    "data.batch_size=2",
    "trainer.max_steps=1",
)


def test_files_that_stand_alone_are_named(cli, tmp_path):
    root = dataset(tmp_path / "set", images=[f"i{k}" for k in range(9)], masks=["i0"])
    line = refused(cli, tmp_path, *OWN, f"data.root={root}")
    assert "i1, i2, i3, i4, i5 and 3 more" in line
    root = dataset(tmp_path / "other", images=["a"], masks=["a", "b"])
    assert "b" in refused(cli, tmp_path, *OWN, f"data.root={root}").split("none for")[1]


def test_an_empty_or_missing_dataset_is_named(cli, tmp_path):
    root = dataset(tmp_path / "set", images=(), masks=())
    assert "holds none" in refused(cli, tmp_path, *OWN, f"data.root={root}")
    assert "data.root" in refused(cli, tmp_path, *OWN, f"data.root={tmp_path / 'absent'}")
    assert "data.root" in refused(cli, tmp_path, *OWN)


@pytest.mark.parametrize("fault", ["size", "palette", "colour", "cut"])
def test_an_unfit_mask_is_named_before_anything_is_written(cli, tmp_path, fault):
    root = dataset(tmp_path / "set")
    path = root / "train" / "masks" / "b.png"
    if fault == "size":
        Image.new("L", (41, 30)).save(path)
    elif fault == "palette":
        Image.new("P", (40, 30)).save(path)
    elif fault == "colour":
        Image.new("RGB", (40, 30), (255, 0, 0)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:60])
    line = refused(cli, tmp_path, *OWN, f"data.root={root}")
    assert "b.png" in line


def test_a_root_that_is_no_folder_is_refused_before_anything_is_loaded(cli, tmp_path):
    (tmp_path / "file").write_text("")
    for root, words in (("nowhere", "does not exist"), ("file", "is a file")):
        line = refused(cli, tmp_path, *OWN, f"data.root={tmp_path / root}")
        assert line == f"segrl: data.root: must be a folder; {tmp_path / root} {words}"


def test_a_checkpoint_of_another_architecture_a_foreign_file_and_a_cut_one_are_refused(
    cli, tmp_path, nano_weights
):
    import torch

    code, out, err = cli(*DEMO, "reference=frozen_copy")
    assert code == 0 and "reference: not used" in out, err
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    other = (*DEMO, f"policy.weights={nano_weights('qwen3_vl')}")
    for key in ("ckpt_path", "init_from"):
        assert key in refused(cli, tmp_path, *other, f"{key}={checkpoint}")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:-5000])
    assert "cut.ckpt" in refused(cli, tmp_path, *DEMO, f"ckpt_path={cut}")
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    line = refused(cli, tmp_path, *DEMO, f"init_from={tmp_path / 'foreign.ckpt'}")
    assert line.startswith("segrl: init_from: ") and "foreign.ckpt" in line
    torch.save({"state_dict": {"x": pytest.approx}}, tmp_path / "code.ckpt")
    assert "code.ckpt" in refused(cli, tmp_path, *DEMO, f"init_from={tmp_path / 'code.ckpt'}")


def test_help_takes_under_two_seconds():
    began = time.process_time_ns(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "segrl.train", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "experiment: " in done.stdout and "stage.group_size=8" in done.stdout
    heavy = [
        name
        for name in (" torch\n", "transformers\n", "lightning\n", "mlflow\n", "sam2\n")
        if name in done.stderr
    ]
    assert not heavy
    assert time.monotonic() - began[1] < 20  # a busy machine; what it imports is what decides


def test_a_bug_of_ours_keeps_its_traceback(cli, monkeypatch):
    from segrl import train

    def broken(cfg):
        int("not a number")

    monkeypatch.setattr(train, "check", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        cli(*DEMO)


def test_help_that_is_cut_off_ends_without_a_traceback():
    done = subprocess.run(
        f"{sys.executable} -m segrl.train --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "" and done.stdout.startswith("Train a policy")


@pytest.mark.parametrize(
    "module", ["train", "evaluate", "score", "export", "serve", "prepare check", "prepare traces"]
)
def test_help_says_what_a_command_does_and_its_keys_and_no_group_that_it_does_not_use(cli, module, capsys):
    name, *job = module.split()
    code, out, _ = cli(*job, "--help", module=name, runs=None)
    assert code == 0 and f"python -m segrl.{module}" in out
    if name in ("score", "export"):
        assert "experiment" not in out and "(required)" in out and "stage" not in out


def test_the_list_of_commands_is_whole(capsys, monkeypatch):
    import tomllib
    from pathlib import Path

    from segrl import __main__ as listing

    monkeypatch.setattr(sys, "argv", ["segrl"])
    listing.main()
    out = capsys.readouterr().out
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts.values()) == {f"segrl.{name}:main" for name in listing.COMMANDS}
    assert all(f"segrl.{name}" in out for name in listing.COMMANDS)
