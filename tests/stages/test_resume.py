"""A run that was cut off and resumed ends with the weights, bit for bit, of one that never was."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from segrl.rollout import vllm_wire
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.stages.policy_gradient import PolicyGradientStage

RUN = (
    "+experiment=demo", "logger=csv", "data.batch_size=2", "data.train_length=8", "data.test_length=2",
    "rollout.max_tokens=24", "stage.group_size=3", "trainer.max_steps=6",
    "callbacks.checkpoint.every_n_steps=3", "trainer.accelerator=cpu", "stage.optimizer.lr=1e-3",
    "stage.schedule=null",
)  # fmt: skip


class Killed(BaseException):
    """Stands for a kill: nothing in the run may catch it."""


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same(a, b):
    """Return whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(("workers", "dies_at", "every"), [(0, 5, 3), (1, 4, 3), (1, 5, 4), (0, 5, 2)])
def test_resume_equals_never_having_stopped(cli, tmp_path, monkeypatch, workers, dies_at, every):
    """An epoch has four updates: the resumed part crosses into a new permutation, or begins with it."""
    arguments = (*RUN, f"data.workers={workers}", f"callbacks.checkpoint.every_n_steps={every}")
    code, _, err = cli(*arguments, f"paths.run={tmp_path}/whole")
    assert code == 0, err
    update = PolicyGradientStage.update

    def dying(stage, minibatch):
        if stage.global_step == dies_at:
            raise Killed
        return update(stage, minibatch)

    monkeypatch.setattr(PolicyGradientStage, "update", dying)
    with pytest.raises(Killed):
        cli(*arguments, f"paths.run={tmp_path}/cut")
    monkeypatch.setattr(PolicyGradientStage, "update", update)
    cut = tmp_path / "cut"
    assert state(cut)["global_step"] == dies_at // every * every and not (cut / "metrics.json").exists()
    goes_on(cli, cut, tmp_path / "whole")


def goes_on(cli, cut, whole):
    """Check that the resumed run ends as the whole run did."""
    code, _, err = cli(f"resume={cut}", runs=None)
    assert code == 0, err
    assert state(cut)["global_step"] == 6
    assert same(state(whole)["state_dict"], state(cut)["state_dict"])
    assert same(state(whole)["optimizer_states"], state(cut)["optimizer_states"])
    histories = [(run / "history.jsonl").read_text() for run in (whole, cut)]
    assert histories[0] == histories[1]
    tables = [json.loads((run / "metrics.json").read_text())["test"] for run in (whole, cut)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("dies_at", [2, 4])
def test_a_run_that_cannot_go_on_keeps_what_it_learned(cli, tmp_path, monkeypatch, dies_at):
    """A server or a file is gone, in the middle of an epoch or at its beginning, before a
    checkpoint is due.
    """
    arguments = (*RUN, "data.workers=0", "callbacks.checkpoint.every_n_steps=100")
    code, _, err = cli(*arguments, f"paths.run={tmp_path}/whole")
    assert code == 0, err
    sample, cut, rollouts = SharedPrefixEngine.sample, tmp_path / "cut", []

    def gone(engine, policy, prefixes, *given):
        rollouts.append(1)
        if len(rollouts) > dies_at:
            vllm_wire.check_lengths(prefixes, 0)  # any refusal of ours
        return sample(engine, policy, prefixes, *given)

    monkeypatch.setattr(SharedPrefixEngine, "sample", gone)
    code, out, err = cli(*arguments, f"paths.run={cut}")
    assert code == 2 and f"resume={cut}" in out and "rollout.max_prefix" in err
    assert state(cut)["global_step"] == dies_at
    monkeypatch.setattr(SharedPrefixEngine, "sample", sample)
    goes_on(cli, cut, tmp_path / "whole")


def test_ckpt_path_goes_on_in_a_new_folder(cli, tmp_path):
    code, _, err = cli(*RUN, f"paths.run={tmp_path}/whole")
    assert code == 0, err
    code, _, err = cli(*RUN, "trainer.max_steps=3", f"paths.run={tmp_path}/half")
    assert code == 0, err
    code, _, err = cli(*RUN, f"ckpt_path={tmp_path}/half/checkpoints/last.ckpt", f"paths.run={tmp_path}/rest")
    assert code == 0, err
    assert same(state(tmp_path / "whole")["state_dict"], state(tmp_path / "rest")["state_dict"])


def test_resume_takes_the_runs_own_configuration(cli, tmp_path):
    code, _, err = cli(*RUN, "trainer.max_steps=3", f"paths.run={tmp_path}/half")
    assert code == 0, err
    code, _, err = cli(f"resume={tmp_path}/half", "policy=nano", runs=None)
    assert code == 2 and "policy=nano" in err
    code, _, err = cli(f"resume={tmp_path}/half", "trainer.max_steps=4", "data.test_length=3", runs=None)
    assert code == 2 and "ids differ" in err  # the override reached the datasets that refer to it
    for wrong in (
        "policy.temprature=0.2",
        "rollout.timeout=3",
        "stage.optimizer.lr=1",
        "stage.schedule=null",
    ):
        code, _, err = cli(f"resume={tmp_path}/half", wrong, runs=None)
        assert code == 2 and f"; {wrong} cannot be changed" in err
    code, _, err = cli(f"resume={tmp_path}/half", "trainer.max_steps=4", runs=None)
    assert code == 0, err
    assert state(tmp_path / "half")["global_step"] == 4


def test_a_key_that_the_defaults_lack_is_changed_where_the_run_has_it(cli, tmp_path):
    code, _, err = cli(*RUN, "stage=ppo", "trainer.max_steps=2", f"paths.run={tmp_path}/run")
    assert code == 0, err
    code, _, err = cli(f"resume={tmp_path}/run", "trainer.max_steps=4", "stage.discount=0.5", runs=None)
    assert code == 0, err
    assert "discount: 0.5" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(cli, tmp_path):
    """Its schedule was made for one update, which shows only when the checkpoint is loaded."""
    code, _, err = cli(*RUN[:-1], "trainer.max_steps=1", f"paths.run={tmp_path}/run")
    assert code == 0, err
    before = (tmp_path / "run" / "config.yaml").read_text()
    code, out, err = cli(f"resume={tmp_path}/run", "trainer.max_steps=3", runs=None)
    assert code == 2 and "as many updates as before, 1;" in err and "continue with" not in out
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    code, _, err = cli(f"resume={tmp_path}/run", runs=None)
    assert code == 0, err


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(cli, tmp_path, monkeypatch):
    save = torch.save
    saves = []

    def full(checkpoint, file):
        saves.append(1)
        if len(saves) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    code, _, err = cli(*RUN, f"paths.run={tmp_path}/run")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("segrl: ")]
    assert "no space" in line and "last.ckpt" in line and "intact" in line
    assert state(tmp_path / "run")["global_step"] == 3
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


def start(tmp_path, name):
    command = [sys.executable, "-m", "segrl.train", *RUN, "data.workers=1", f"paths.runs={tmp_path}/runs",
               f"paths.run={tmp_path}/{name}", "trainer.max_steps=12",
               "callbacks.checkpoint.every_n_steps=2"]  # fmt: skip
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a group of its own
    )


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Return the run that is killed elsewhere, left alone, and how long it took."""
    home, began = tmp_path_factory.mktemp("never"), time.monotonic()
    assert start(home, "whole").wait() == 0
    return home / "whole", time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("number", range(int(os.environ.get("SEGRL_KILLS", "50"))))
def test_a_run_that_was_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, never_stopped, number):
    """SIGKILL comes at moments spread over the whole run; the resumed run ends with the same bits."""
    whole, seconds = never_stopped
    process = start(tmp_path, "cut")
    time.sleep(seconds * (number + 0.5) / 50)
    process.kill()
    process.wait()
    process.stdout.read()  # ends only when the loader's process is gone, too
    if not (tmp_path / "cut" / "config.yaml").is_file():
        return  # nothing was written yet, so nothing can be lost
    done = subprocess.run([sys.executable, "-m", "segrl.train", f"resume={tmp_path}/cut"],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(state(whole)["state_dict"], state(tmp_path / "cut")["state_dict"])
    assert (whole / "history.jsonl").read_text() == (tmp_path / "cut" / "history.jsonl").read_text()


def test_a_run_recorded_in_mlflow_goes_on_in_its_record(cli, tmp_path):
    """The default logger writes parameters once, and the resumed part belongs to the same MLflow run."""
    from mlflow.tracking import MlflowClient

    arguments = [argument for argument in RUN if argument != "logger=csv"]
    code, _, err = cli(*arguments, "trainer.max_steps=3", f"paths.run={tmp_path}/half")
    assert code == 0, err
    run_id = (tmp_path / "half/mlflow_run_id").read_text()
    code, _, err = cli(f"resume={tmp_path}/half", "trainer.max_steps=4", runs=None)
    assert code == 0, err
    assert (tmp_path / "half/mlflow_run_id").read_text() == run_id
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    steps = {m.step for m in client.get_metric_history(run_id, "reward/total")}
    assert len(steps) == 4 and client.get_run(run_id).info.status == "FINISHED"
    code, _, err = cli(f"resume={tmp_path}/nothing", runs=None)
    assert code == 2
    (tmp_path / "half/checkpoints/last.ckpt").unlink()
    code, _, err = cli(f"resume={tmp_path}/half", runs=None)
    assert code == 2 and "last.ckpt is missing" in err
