"""A damaged file of a run's folder is named in one line, or is made again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

RUN = (
    "+experiment=demo", "logger=csv", "data.workers=0", "data.batch_size=2", "data.train_length=2",
    "data.test_length=2", "rollout.max_tokens=4", "stage.group_size=2", "stage.schedule=null",
    "trainer.max_steps=1", "trainer.accelerator=cpu", "trainer.val_check_interval=1",
    "callbacks.best.monitor=val/synthetic/sm", "data.val_length=2",
)  # fmt: skip
DAMAGES = (
    "bytes",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cut", "empty", "list")),
    "folder",
)
AGAIN = {  # made again from what is left; everything else is refused
    "history.jsonl": ("bytes", "cut", "empty", "list"),
    "evaluation/before.jsonl": ("bytes", "cut", "empty", "list"),
    "evaluation/before.npz": ("bytes", "cut", "empty", "list"),
    "metrics.json": ("bytes", "cut", "empty", "list"),
}
TRAINED = ("config.yaml", *AGAIN, "checkpoints/last.ckpt", "checkpoints/best.ckpt")


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    if kind == "folder":
        path.unlink()
        path.mkdir()
        return
    path.write_bytes({
        "bytes": bytes(range(128, 256)) * 4, "cut": whole[: len(whole) * 2 // 3 - 3], "empty": b"",
        "list": b"[1, 2]\n",
    }[kind])  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made") / "run"


@pytest.fixture
def run(cli, tmp_path, made):
    """Return a copy of a finished run of one update."""
    if not made.exists():
        code, _, err = cli(*RUN, f"paths.run={made}", runs=None)
        assert code == 0, err
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def line_of(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("segrl: ")
    return line


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_damaged_file_of_a_run_is_named_or_made_again(cli, run, made, name, kind):
    damage(run / name, kind)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, out, err = cli(f"resume={run}", runs=None)
    if kind in AGAIN.get(name, ()):
        assert code == 0, err
        if name != "history.jsonl":
            ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (run, made))
            assert (ours["test"], ours["metrics"]) == (theirs["test"], theirs["metrics"])
        else:
            assert str(run / name) in out
    else:
        assert code == 2 and name.rpartition("/")[2] in line_of(err), (code, err)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "provenance.json", "checkpoints/last.ckpt"])
def test_a_damaged_file_is_not_exported(cli, run, tmp_path, name, kind):
    damage(run / name, kind)
    scored = "best" if name == "metrics.json" else "last"  # scores are read where they are the checkpoint's
    ckpt = f"ckpt={run}/checkpoints/{scored}.ckpt"
    code, _, err = cli(ckpt, f"out={tmp_path}/out", module="export", runs=None)
    assert code == 2 and name.rpartition("/")[2] in line_of(err), (code, err)
    assert not (tmp_path / "out").exists()


EVALUATION = (
    "+suite=synthetic", "testsets.synthetic.samples.length=2", "testsets.synthetic.published=2", "logger=csv",
    "trainer=cpu", "data.workers=0", "suite.draws=0", "rollout.max_tokens=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated") / "run"


@pytest.fixture
def evaluation(cli, tmp_path, evaluated):
    """Return a copy of a finished evaluation."""
    if not evaluated.exists():
        code, _, err = cli(*EVALUATION, f"paths.run={evaluated}", module="evaluate", runs=None)
        assert code == 0, err
    shutil.copytree(evaluated, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "weights.json", "per_sample.jsonl", "metrics.json"])
def test_a_damaged_file_of_an_evaluation_is_named_or_made_again(cli, evaluation, name, kind):
    whole = (evaluation / "per_sample.jsonl").read_text()
    damage(evaluation / name, kind)
    code, _, err = cli(f"resume={evaluation}", module="evaluate", runs=None)
    if kind != "folder" and name in ("per_sample.jsonl", "metrics.json"):
        assert code == 0, err
        found = [json.loads(text) for text in (evaluation / "per_sample.jsonl").read_text().splitlines()]
        wanted = [json.loads(text) for text in whole.splitlines()]
        assert [{**line, "seconds": 0} for line in found] == [{**line, "seconds": 0} for line in wanted]
    else:
        assert code == 2 and name in line_of(err), (code, err)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9, 0.9999])
def test_one_bit_that_changed_in_a_checkpoint_is_refused(run, place):
    from segrl.tracking.checkpoints import read_checkpoint

    path = run / "checkpoints" / "last.ckpt"
    read_checkpoint(path, "resume")
    whole = bytearray(path.read_bytes())
    whole[int(place * (len(whole) - 1))] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"resume: must be a checkpoint.*last\.ckpt"):
        read_checkpoint(path, "resume")


@pytest.mark.parametrize("place", [0.2, 0.7])
def test_one_bit_that_changed_in_a_checkpoint_without_a_digest_is_refused(tmp_path, place):
    """Checkpoints without a digest have only the checksums of their zip."""
    from segrl.tracking.checkpoints import read_checkpoint

    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"x": torch.arange(5000.0)}}, path)
    assert read_checkpoint(path, "init_from")["state_dict"]["x"][7] == 7
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"init_from: .*old\.ckpt have changed"):
        read_checkpoint(path, "init_from")


def test_one_bit_that_changed_in_an_export_is_refused(cli, run, tmp_path):
    from segrl.segmenter import Segmenter

    out = tmp_path / "out"
    code, _, err = cli(f"ckpt={run}/checkpoints/last.ckpt", f"out={out}", module="export", runs=None)
    assert code == 0, err
    Segmenter.from_pretrained(out)
    for name in ("model.safetensors", "segrl.json", "instructions.yaml"):
        whole = bytearray((out / name).read_bytes())
        changed = bytearray(whole)
        places = {"segrl.json": changed.rfind(b"4"), "instructions.yaml": changed.rfind(b"query")}
        place = places.get(name, len(changed) // 2) - (name == "instructions.yaml") * 3
        changed[place] ^= 1
        (out / name).write_bytes(changed)
        with pytest.raises(ValueError, match=f"{name} must be as it was written"):
            Segmenter.from_pretrained(out)
        (out / name).write_bytes(whole)


def test_the_weights_that_ship_are_those_that_are_listed(tmp_path, monkeypatch):
    from segrl.host import digests
    from segrl.nano.make import HERE, WEIGHTS

    assert [line.split("  ")[1] for line in (HERE / digests.NAME).read_text().splitlines()] == sorted(WEIGHTS)
    digests.check(HERE / "policy_nano", "policy.weights")
    digests.check(HERE / "sam2_nano.safetensors", "head.checkpoint")
    shutil.copytree(HERE, tmp_path / "assets")
    monkeypatch.setattr(digests, "_SHIPPED", tmp_path / "assets")
    for name in WEIGHTS:
        path = tmp_path / "assets" / name
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=f"key: .*{path.name} must be as it was written"):
            digests.check(path.parent if "/" in name else path, "key")
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
