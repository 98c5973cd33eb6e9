"""A run that is asked to stop says what is on the disk, and goes on from there, wherever the signal came."""

import json
import os
import signal

import pytest
import torch

from segrl import running
from segrl.metrics.functional import overlap
from segrl.models.hf_vlm import HFPolicy
from segrl.segmenter import Segmenter
from segrl.stages.base import Stage
from segrl.stages.policy_gradient import PolicyGradientStage
from segrl.tracking.callbacks import Progress

RUN = (
    "+experiment=demo", "logger=csv", "data.workers=0", "data.batch_size=2", "data.train_length=4", "data.test_length=2",
    "rollout.max_tokens=6", "stage.group_size=2", "stage.schedule=null", "trainer.max_steps=3", "trainer.accelerator=cpu",
    "trainer.val_check_interval=1", "callbacks.checkpoint.every_n_steps=100", "callbacks.best.monitor=val/synthetic/sm",
    "data.val_length=2", "stage.optimizer.lr=1e-3",
)  # fmt: skip


@pytest.fixture
def at(monkeypatch):
    """Send this process a signal at the n-th call of a function, before it runs."""

    def put(owner: object, name: str, number: int, sent: int = signal.SIGTERM, where=lambda *a: True) -> None:
        before, calls = getattr(owner, name), []

        def struck(*given, **named):
            if where(*given):
                calls.append(1)
                if len(calls) == number:
                    os.kill(os.getpid(), sent)
            return before(*given, **named)

        monkeypatch.setattr(owner, name, struck)

    return put


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, never stopped."""
    return {"folder": tmp_path_factory.mktemp("whole") / "run"}


def goes_on(cli, run, whole):
    """Resumed, it ends as the run that was never stopped."""
    if not whole["folder"].exists():
        code, _, err = cli(*RUN, f"paths.run={whole['folder']}")
        assert code == 0, err
    code, _, err = cli(f"resume={run}", runs=None)
    assert code == 0, err
    ours, theirs = state(run)["state_dict"], state(whole["folder"])["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (run, whole["folder"]))
    assert (ours["test"], ours["metrics"]) == (theirs["test"], theirs["metrics"])
    ours, theirs = ((f / "history.jsonl").read_text() for f in (run, whole["folder"]))
    assert ours == theirs


def validating(stage, batch):
    return stage.trainer.validating


def testing(stage, batch):
    return stage.trainer.testing


# where the signal comes; the first words of the line; the step that is saved
PHASES = {
    "between steps": ((Stage, "on_train_batch_start", 2, signal.SIGINT), "stopped and saved at step 2", 2),
    "in a step": ((PolicyGradientStage, "update", 2, signal.SIGTERM), "stopped and saved at step 2", 2),
    "after a step": ((Progress, "on_train_batch_end", 1, signal.SIGINT), "stopped and saved at step 1", 1),
    "in a validation": (
        (PolicyGradientStage, "evaluate_batch", 2, signal.SIGTERM, validating), "stopped and saved at step 2", 2,
    ),
    "in the last validation": (
        (PolicyGradientStage, "evaluate_batch", 3, signal.SIGINT, validating), "stopped and saved at step 3", 3,
    ),
    "while saving": ((torch, "save", 1, signal.SIGTERM), "stopped and saved at step", None),
    "scoring before": ((Segmenter, "__call__", 1, signal.SIGINT), "stopped before its first update", None),
    "scoring after": (
        (PolicyGradientStage, "evaluate_batch", 2, signal.SIGTERM, testing), "trained and saved at step 3, not scored", 3,
    ),
    "closing figures": ((running, "curves", 1, signal.SIGINT), "trained and saved at step 3, not scored", 3),
    "copying": ((running, "keep", 1, signal.SIGTERM), "trained, saved at step 3 and scored", 3),
}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_said_is_on_the_disk_and_goes_on(cli, tmp_path, at, monkeypatch, whole, phase):
    struck, words, step = PHASES[phase]
    run = tmp_path / "run"
    at(*struck)
    code, out, err = cli(*RUN, f"paths.run={run}")
    monkeypatch.undo()
    assert code == 128 + struck[3], (code, out, err)
    (line,) = [line for line in out.splitlines() if line.startswith(("stopped", "trained"))]
    assert line.startswith(words) and f"python -m segrl.train resume={run}" in line, line
    assert (run / "checkpoints" / "last.ckpt").exists() == (step is not None or "saved" in words)
    if step is not None:
        assert state(run)["global_step"] == step
    assert (run / "metrics.json").exists() == (phase == "copying")
    goes_on(cli, run, whole)


def test_before_anything_is_written_nothing_is(cli, tmp_path, at):
    at(HFPolicy, "__init__", 1, signal.SIGINT)
    code, out, err = cli(*RUN)
    assert (code, out, err) == (130, "stopped by SIGINT before anything was written\n", "")
    assert not (tmp_path / "runs").exists()


def test_a_sweep_ends_behind_the_job_that_was_stopped(cli, tmp_path, at):
    """Behind a job that failed, too: the sweep was stopped, and that is what its exit code says."""
    client = pytest.importorskip("mlflow.tracking").MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    at(PolicyGradientStage, "update", 2)
    jobs = (f"init_from={tmp_path}/bad.ckpt,null", "seed=1,2")
    code, out, err = cli("-m", *RUN, "logger=mlflow", "test_before=false", *jobs[::-1])
    assert code == 143, err
    assert "stopped and saved at step 2" in out and err.count("failed: init_from") == 1
    assert out.splitlines()[-1] == "the sweep was stopped: 0 of 4 jobs ended, 2 were not begun"
    assert "job 2 of 4" in out and "job 3 of 4" not in out
    assert len(list((tmp_path / "runs" / "demo").iterdir())) == 1
    (rows,) = (tmp_path / "runs" / "sweeps").glob("*/jobs.jsonl")
    assert [json.loads(line)["job"] for line in rows.read_text().splitlines()] == [1, 2]
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert len(runs) == 2 and {run.info.status for run in runs} == {"KILLED"}


def test_an_evaluation_keeps_what_was_answered(cli, tmp_path, at):
    arguments = (
        "+suite=synthetic", "testsets.synthetic.samples.length=6", "testsets.synthetic.published=6", "logger=csv",
        "trainer=cpu", "data.workers=0", "suite.draws=0", "suite.batch_size=2", "rollout.max_tokens=4",
    )  # fmt: skip
    at(Segmenter, "__call__", 3, signal.SIGINT)
    code, out, err = cli(*arguments, f"paths.run={tmp_path}/a", module="evaluate")
    assert code == 130, err
    last = out.splitlines()[-1]
    assert last == (
        f"stopped; 4 of 6 samples are answered and kept; go on with: python -m segrl.evaluate resume={tmp_path}/a"
    )
    code, out, err = cli(f"resume={tmp_path}/a", module="evaluate", runs=None)
    assert code == 0 and "4 of 6 were there" in out, err


def test_nothing_half_written_is_left(cli, tmp_path, at):
    from PIL import Image

    from segrl import prepare
    from segrl.data.synthetic import SyntheticScenes

    scenes = SyntheticScenes("test", 2, 0, 128, (0.5, 1.0), (1, 1))
    for i in range(2):
        for kind, pixels in (("images", scenes[i].image), ("masks", scenes[i].mask)):
            (tmp_path / "set/train" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set/train" / kind / f"{i}.png")
    files = sorted(tmp_path.rglob("*"))
    at(overlap, "iou", 1, signal.SIGINT)
    at(prepare, "write", 1)
    line = "stopped by SIG{}; nothing half-written is left\n"
    traces = ("data=image_mask", f"data.root={tmp_path}/set", f"out={tmp_path}/set/t.jsonl", "least_iou=0.01")
    for name, code in (("INT", 130), ("TERM", 143)):
        assert cli("traces", *traces, module="prepare", runs=None) == (code, line.format(name), "")
        assert sorted(tmp_path.rglob("*")) == files


def test_a_second_signal_stops_at_once(tmp_path):
    """In a process of its own: what is at once does not return."""
    import subprocess
    import sys

    code = (
        "import os, signal, sys, time; from segrl import stopping\n"
        "with stopping.watched(), stopping.held():\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.2)\n"
        "    print('held', stopping.asked(), flush=True); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 143 and done.stdout == "held 2\n"
    assert done.stderr == "segrl: a second signal (SIGTERM): stopped at once\n"
