"""A hundred signals at random moments: what is said of each agrees with what is on the disk."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

SMALL = (
    "logger=csv",
    "data.test_length=4",
    "rollout.max_tokens=6",
    "trainer.accelerator=cpu",
    "data.workers=1",
)
TRAIN = (
    "+experiment=demo", *SMALL, "data.batch_size=2", "data.train_length=8", "stage.group_size=2",
    "stage.schedule=null", "trainer.max_steps=8", "callbacks.checkpoint.every_n_steps=3",
    "trainer.val_check_interval=2", "data.val_length=2",
)  # fmt: skip
EVALUATE = ("+experiment=demo", *SMALL, "suite.draws=0", "suite.batch_size=1")
SWEEP = ("-m", *TRAIN, "seed=1,2")
COUNT = int(os.environ.get("SEGRL_SIGNALS", "100"))
_seconds: dict[str, float] = {}


def begin(module, arguments, home):
    return subprocess.Popen(
        [sys.executable, "-m", f"segrl.{module}", *arguments], cwd=home, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def lasts(module, arguments, home):
    """Return the seconds that the command takes when left alone."""
    key = f"{module} {len(arguments)}"
    if key not in _seconds:
        began = time.monotonic()
        home.mkdir()
        assert begin(module, arguments, home).wait() == 0
        _seconds[key] = time.monotonic() - began
    return _seconds[key]


def step_of(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
def test_after_a_signal_at_any_moment_the_disk_holds_what_is_said(tmp_path, tmp_path_factory, number):
    drawn = random.Random(number)
    module, arguments = drawn.choice(
        [("train", TRAIN)] * 4 + [("evaluate", EVALUATE)] * 2 + [("train", SWEEP)]
    )
    sent, group = drawn.choice([signal.SIGINT, signal.SIGTERM]), drawn.random() < 0.5
    seconds = lasts(module, arguments, tmp_path_factory.mktemp("alone") / "home")
    process = begin(module, arguments, tmp_path)
    time.sleep(1 + drawn.random() * seconds)  # a second for Python itself
    if process.poll() is not None:
        return
    (os.killpg if group else os.kill)(process.pid, sent)
    out, err = process.communicate(timeout=120)  # its workers are gone, too: they hold the pipes
    assert process.returncode in (128 + sent, 0, -sent), (out, err)
    assert err == "", err
    if process.returncode == -sent and not out:  # the signal came before segrl's handler was set
        assert not list(tmp_path.rglob("config.yaml"))
        return
    if process.returncode in (0, -sent):  # the signal came after all was done
        assert "results in" in out
        return
    said = [line for line in out.splitlines() if line.startswith(("stopped", "trained", "the sweep"))]
    assert said, out
    if any("before anything was written" in line for line in said):
        assert not list(tmp_path.rglob("config.yaml")) or module == "train" and "-m" in arguments
        return
    if match := re.search(r"(\d+) of 4 samples", said[-1]):
        lines = [text for path in tmp_path.rglob("*.jsonl") for text in path.read_text().splitlines()]
        assert len(lines) == int(match[1])
    for line in said:
        if match := re.search(r"saved at step (\d+)", line):
            folder = tmp_path / re.search(r"resume=(\S+)", line)[1]
            assert step_of(folder) == int(match[1])
    if number % 5 == 0 and "resume=" in said[0]:
        folder = re.search(r"resume=(\S+)", said[0])[1]
        again = begin(module, [f"resume={folder}"], tmp_path)
        out, err = again.communicate(timeout=600)
        assert again.returncode == 0, (out, err)
        assert json.loads((tmp_path / folder / "metrics.json").read_text())
