"""A run that is asked to stop says what is on the disk and resumes from there, whenever the signal came."""

import json
import os
import signal

import pytest
import torch
from PIL import Image

from segrl.data import annotator as traces
from segrl.data.synthetic import SyntheticScenes
from segrl.host import signals
from segrl.host.files import lock
from segrl.models.hf_vlm import HFPolicy
from segrl.models.sam2_head import Sam2Head
from segrl.runs import training
from segrl.segmenter import Segmenter
from segrl.stages.base import Stage
from segrl.stages.policy_gradient import PolicyGradientStage
from segrl.tracking.callbacks import Progress

RUN = (
    "+experiment=demo", "logger=csv", "data.workers=0", "data.batch_size=2", "data.train_length=4",
    "data.test_length=2", "rollout.max_tokens=6", "stage.group_size=2", "stage.schedule=null",
    "trainer.max_steps=3", "trainer.accelerator=cpu", "trainer.val_check_interval=1",
    "callbacks.checkpoint.every_n_steps=100", "callbacks.best.monitor=val/synthetic/sm", "data.val_length=2",
    "stage.optimizer.lr=1e-3",
)  # fmt: skip


@pytest.fixture
def at(monkeypatch):
    """Return a function that sends this process a signal at the n-th call of a function, before it runs."""

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
    """Return the same run, never stopped."""
    return {"folder": tmp_path_factory.mktemp("whole") / "run"}


def goes_on(cli, run, whole):
    """Check that the resumed run ends as the run that was never stopped."""
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


def scoring(stage, batch):
    return stage.trainer.testing


# where the signal comes; the first words of the line; the step that is saved
PHASES = {
    "between steps": ((Stage, "on_train_batch_start", 2, signal.SIGINT), "stopped and saved at step 2", 2),
    "in a step": ((PolicyGradientStage, "update", 2, signal.SIGTERM), "stopped and saved at step 2", 2),
    "after a step": ((Progress, "on_train_batch_end", 1, signal.SIGINT), "stopped and saved at step 1", 1),
    "in a validation": (
        (PolicyGradientStage, "evaluate_batch", 2, signal.SIGTERM, validating),
        "stopped and saved at step 2", 2,
    ),
    "in the last validation": (
        (PolicyGradientStage, "evaluate_batch", 3, signal.SIGINT, validating),
        "stopped and saved at step 3", 3,
    ),
    "while saving": ((torch, "save", 1, signal.SIGTERM), "stopped and saved at step", None),
    "scoring before": ((Segmenter, "__call__", 1, signal.SIGINT), "stopped before the first update", None),
    "scoring after": (
        (PolicyGradientStage, "evaluate_batch", 2, signal.SIGTERM, scoring),
        "trained and saved at step 3, not scored", 3,
    ),
    "closing figures": ((training, "curves", 1, signal.SIGINT), "trained and saved at step 3, not scored", 3),
    "copying": ((training, "keep", 1, signal.SIGTERM), "trained, saved at step 3 and scored", 3),
}  # fmt: skip


SOON = (
    "in a step",
    "in the last validation",
    "while saving",
    "scoring before",
    "copying",
)  # the others are slow tests


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=() if p in SOON else pytest.mark.slow) for p in PHASES]
)
def test_a_stopped_run_has_on_the_disk_what_it_says_and_resumes(cli, tmp_path, at, monkeypatch, whole, phase):
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


def test_a_run_that_is_stopped_before_it_writes_leaves_nothing(cli, tmp_path, at):
    at(HFPolicy, "__init__", 1, signal.SIGINT)
    code, out, err = cli(*RUN)
    assert (code, out, err) == (130, "stopped by SIGINT before anything was written\n", "")
    assert not (tmp_path / "runs").exists()


def test_a_sweep_ends_after_the_job_that_was_stopped(cli, tmp_path, at):
    """This holds after a failed job, too: the exit code says that the sweep was stopped."""
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
        "+suite=synthetic", "testsets.synthetic.samples.length=6", "testsets.synthetic.published=6",
        "logger=csv", "trainer=cpu", "data.workers=0", "suite.draws=0", "suite.batch_size=2",
        "rollout.max_tokens=4",
    )  # fmt: skip
    at(Segmenter, "__call__", 3, signal.SIGINT)
    code, out, err = cli(*arguments, f"paths.run={tmp_path}/a", module="evaluate")
    assert code == 130, err
    last = out.splitlines()[-1]
    assert last == (
        "stopped; 4 of 6 samples are answered and saved; "
        f"continue with: python -m segrl.evaluate resume={tmp_path}/a"
    )
    code, out, err = cli(f"resume={tmp_path}/a", module="evaluate", runs=None)
    assert code == 0 and "4 of 6 were answered before" in out, err


@pytest.fixture
def four_scenes(tmp_path):
    """Return a folder of four images with masks."""
    scenes = SyntheticScenes("test", 4, 0, 128, (0.5, 1.0), (1, 1))
    for i in range(4):
        for kind, pixels in (("images", scenes[i].image), ("masks", scenes[i].mask)):
            (tmp_path / "set/train" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set/train" / kind / f"{i}.png")


def test_traces_go_on_where_they_were_stopped(cli, tmp_path, monkeypatch, four_scenes):
    files = sorted(tmp_path.rglob("*"))
    judged, stops, segment, kept = [], [2], Sam2Head.segment, [True, False, True, True]

    def struck(head, images, prompts):
        judged.append(1)
        if len(judged) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return segment(head, images, prompts)

    monkeypatch.setattr(Sam2Head, "segment", struck)
    monkeypatch.setattr(traces, "iou", lambda *_: kept[(len(judged) - 1) % 4])
    out, partial = tmp_path / "set/t.jsonl", tmp_path / "set/t.jsonl.partial"
    command = ("data=image_mask", f"data.root={tmp_path}/set", "head=sam2_nano")
    ended = "3 traces in {}; left out: 1 below IoU 0.6 with head=sam2_nano, 0 without an object\n"
    whole = tmp_path / "set/whole.jsonl"
    stops.clear()
    assert cli("traces", *command, f"out={whole}", module="prepare", runs=None) == (
        0,
        ended.format(whole),
        "",
    )
    stops.append(len(judged) + 2)
    said = (
        f"stopped by SIGINT; 2 of 4 samples are judged and saved in {partial}; the same command continues\n"
    )
    assert cli("traces", *command, f"out={out}", module="prepare", runs=None) == (130, said, "")
    assert not out.exists()
    code, _, err = cli("traces", *command, f"out={out}", "least_iou=0.5", module="prepare", runs=None)
    assert code == 2 and f"out: {partial} must be of the same command" in err
    with partial.open("a") as file:
        file.write('{"image": "a.p')  # a kill, in the middle of a line
    before = len(judged)
    code, said, err = cli("traces", *command, f"out={out}", module="prepare", runs=None)
    assert (code, said) == (0, "  2/4 were judged before\n" + ended.format(out)), err
    assert len(judged) - before == 2 and out.read_text() == whole.read_text()
    assert sorted(tmp_path.rglob("*")) == sorted([*files, out, whole])


def test_a_sample_that_cannot_be_read_loses_no_trace_of_the_others(cli, tmp_path, monkeypatch, four_scenes):
    judged, segment = [], Sam2Head.segment

    def failing(head, images, prompts):
        judged.append(1)
        if len(judged) == 3:
            raise ValueError("c.png: must be an image")
        return segment(head, images, prompts)

    monkeypatch.setattr(Sam2Head, "segment", failing)
    monkeypatch.setattr(traces, "iou", lambda *_: True)
    out = tmp_path / "set/t.jsonl"
    command = ("traces", "data=image_mask", f"data.root={tmp_path}/set", "head=sam2_nano", f"out={out}")
    with pytest.raises(ValueError, match=r"c\.png"):
        cli(*command, module="prepare", runs=None)
    assert not out.exists()
    code, said, err = cli(*command, module="prepare", runs=None)
    assert code == 0 and "2/4 were judged before" in said and "4 traces" in said, err


def test_traces_that_another_process_writes_are_left_alone(cli, tmp_path, four_scenes):
    out, partial = tmp_path / "set/t.jsonl", tmp_path / "set/t.jsonl.partial"
    command = ("traces", "data=image_mask", f"data.root={tmp_path}/set", "head=sam2_nano", f"out={out}")
    with partial.open("w") as other:
        other.write("of the other process")
        other.flush()
        assert lock(other.fileno())
        code, _, err = cli(*command, module="prepare", runs=None)
    assert code == 2 and f"out: {partial} must be free; another process writes it" in err
    assert partial.read_text() == "of the other process" and not out.exists()


def test_signals_are_answered_in_a_process_that_a_launcher_of_sweeps_started(monkeypatch):
    """Its parent is the sweep, whose id it inherits; it is a run of its own nevertheless."""
    monkeypatch.setenv("SEGRL_FIRST_PROCESS", str(os.getppid()))
    before = signal.getsignal(signal.SIGTERM)
    assert signals.is_child()
    with signals.watched(worker=True):
        assert not signals.is_child() and signal.getsignal(signal.SIGTERM) is not before
        with signals.held(), signals.watched(worker=True):  # as a job of the first process is
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked() == signal.SIGTERM
        assert signals.asked() == signal.SIGTERM
    assert signals.is_child() and signal.getsignal(signal.SIGTERM) is before


def test_nothing_is_left_in_the_environment(monkeypatch):
    monkeypatch.delenv("SEGRL_FIRST_PROCESS", raising=False)
    with signals.watched():
        assert os.environ["SEGRL_FIRST_PROCESS"] == str(os.getpid())
    assert "SEGRL_FIRST_PROCESS" not in os.environ


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (1, {}), (1, {"WORLD_SIZE": ""}), (4, {"WORLD_SIZE": "4"}), (1, {"SLURM_NTASKS": "8"}),
        (1, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"}),
        (8, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}),
    ],
)  # fmt: skip
def test_ranks_are_counted_where_a_launcher_started_them(monkeypatch, ranks, said):
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert signals.ranks() == ranks


def test_a_second_signal_stops_at_once(tmp_path):
    """The command runs in a process of its own, which ends without returning."""
    import subprocess
    import sys

    code = (
        "import os, signal, sys, time; from segrl.host import signals\n"
        "with signals.watched(), signals.held():\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.2)\n"
        "    print('held', signals.asked(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 143 and done.stdout == "held 2\n"
    assert done.stderr == "segrl: a second signal (SIGTERM): stopped at once\n"
