"""A run's folder has one owner for as long as the owner's process lives."""

import os
import subprocess
import sys

import pytest

from segrl.host.files import LOCK, own, release, write_whole
from segrl.runs.resuming import resumed
from segrl.tracking import run_folder as folder

OWN = (
    "import pathlib, sys, time; from segrl.tracking import run_folder as folder\n"
    "made = folder.create(pathlib.Path(sys.argv[1]), True); print(made.name, flush=True); time.sleep(60)\n"
)


@pytest.fixture(autouse=True)
def released():
    yield
    release()


def start(path):
    return subprocess.Popen([sys.executable, "-c", OWN, str(path)], stdout=subprocess.PIPE, text=True)


def test_of_runs_that_begin_together_each_gets_its_own(tmp_path):
    started = [start(tmp_path / "runs" / "a") for _ in range(4)]
    names = sorted(one.stdout.readline().strip() for one in started)
    for one in started:
        one.kill()
        one.wait()
    assert names == ["a", "a-2", "a-3", "a-4"]


def test_a_folder_that_is_used_is_refused_until_its_process_has_ended(tmp_path):
    process = start(tmp_path / "a")
    assert process.stdout.readline() == "a\n"
    with pytest.raises(
        ValueError,
        match=rf"resume: {tmp_path}/a must be free; it is used by another process \(pid {process.pid}\)",
    ):
        own(tmp_path / "a", "resume")
    process.kill()
    process.wait()
    own(tmp_path / "a", "resume")
    assert (tmp_path / "a" / LOCK).read_text() == f"{os.getpid()}\n"
    release()
    assert not list((tmp_path / "a").iterdir())


def test_a_forked_worker_does_not_keep_the_folder(tmp_path):
    made = folder.create(tmp_path / "a", True)
    pid = os.fork()
    if pid == 0:
        os.execvp("sleep", ["sleep", "60"])
    release()
    own(made, "resume")
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_where_others_count_on_the_name_no_other_is_chosen(tmp_path):
    folder.create(tmp_path / "a", False)
    with pytest.raises(ValueError, match=f"paths.run: must be a new folder.* {tmp_path}/a exists"):
        folder.create(tmp_path / "a", False)


def test_a_second_resume_of_a_folder_is_refused_in_one_line(cli, tmp_path):
    run = ("+experiment=demo", "logger=csv", "data.workers=0", "data.batch_size=2", "data.train_length=2",
           "data.test_length=1", "rollout.max_tokens=2", "stage.group_size=2", "stage.schedule=null",
           "trainer.max_steps=1", "test_before=false")  # fmt: skip
    code, _, err = cli(*run, f"paths.run={tmp_path}/run")
    assert code == 0, err
    files = sorted((tmp_path / "run").rglob("*"))
    assert LOCK not in {path.name for path in files}
    process = subprocess.Popen(
        [sys.executable, "-c",
         OWN.replace("create", "own").replace("True", "'resume'").replace("made.name", "1"),
         str(tmp_path / "run")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "1\n"
    code, _, err = cli(f"resume={tmp_path}/run", runs=None)
    assert code == 2 and err == (
        f"segrl: resume: {tmp_path}/run must be free; it is used by another process (pid {process.pid}): "
        "wait for its end, or end it\n"
    )
    process.kill()
    process.wait()
    assert {path for path in (tmp_path / "run").rglob("*")} - {tmp_path / "run" / LOCK} == set(files)


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "1")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_whole(path, "2")
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_a_run_without_its_checkpoint_begins_anew_unless_it_was_finished(tmp_path):
    from omegaconf import OmegaConf

    from segrl.runs.configuration import compose_job, register_resolvers

    register_resolvers()
    cfg = compose_job("train", ["+experiment=demo"])
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    cfg.resume = str(tmp_path)
    assert resumed(cfg, []).ckpt_path is None
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="resume: must have its checkpoint.*last.ckpt is missing"):
        resumed(cfg, [])
