"""ZeRO changes only where tensors are stored: weights and checkpoints are those of DDP.

A checkpoint can be resumed under any strategy. The tests need the extra `deepspeed`; `make test-zero` runs
them in an environment of their own. On CPUs DeepSpeed takes the same code paths over gloo.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from segrl.runs.configuration import asset

pytestmark = pytest.mark.zero
RUN = (
    "+experiment=demo", "logger=csv", "trainer.accelerator=cpu", "trainer.devices=2", "data.train_length=64",
    "data.test_length=5", "rollout.max_tokens=24", "data.workers=0", "data.batch_size=2",
    "stage.micro_batch_size=1", "policy.temperature=1.0", "stage.schedule=null", "test_before=false",
)  # fmt: skip
SGD = (
    "stage.optimizer._target_=torch.optim.SGD",
    "~stage.optimizer.betas",
    "~stage.optimizer.eps",
    "stage.optimizer.lr=0.05",
)
# With a tiny eps rounding decides the step of weights that have no gradient.
ADAMW = ("stage.optimizer.lr=1e-4", "stage.optimizer.eps=1e-3")


@pytest.fixture(autouse=True, scope="module")
def installed():
    assert find_spec("deepspeed"), "make test-zero installs DeepSpeed"


def run(folder, *arguments):
    command = [sys.executable, "-m", "segrl.train", *arguments, f"paths.run={folder}"]
    cpu = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=cpu, timeout=900)
    assert done.returncode == 0, (done.stderr + done.stdout)[-4000:]
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def apart(one, other):
    assert one["state_dict"].keys() == other["state_dict"].keys()
    return max((one["state_dict"][k] - other["state_dict"][k]).abs().max() for k in one["state_dict"])


def test_every_level_ends_where_ddp_does(tmp_path):
    case = (*RUN, *SGD, "stage.group_size=3", "stage=sam_r1", "reference=frozen_copy", "trainer.max_steps=4")
    ddp = run(tmp_path / "ddp", *case, "trainer=ddp")
    still = run(tmp_path / "still", *case, "trainer=ddp", "stage.optimizer.lr=1e-20")
    assert apart(ddp, still) > 1e-3
    for level in (1, 2, 3):
        zero = run(tmp_path / f"zero{level}", *case, f"trainer=deepspeed_zero{level}")
        assert apart(ddp, zero) < 1e-6
        after = [tmp_path / name / "evaluation" / "after.jsonl" for name in ("ddp", f"zero{level}")]
        assert after[0].read_text() == after[1].read_text()


def test_what_saves_memory_ends_where_ddp_does(tmp_path):
    """Pieces of groups, and recomputed activations. ZeRO-3 would compute wrong gradients from pieces, and
    refuses them.
    """
    case = (*RUN, *SGD, "stage.group_size=3", "trainer.max_steps=2")
    pieces, again = "stage.completions_per_pass=1", "policy.gradient_checkpointing=true"
    ddp = run(tmp_path / "ddp", *case, "trainer=ddp")
    assert apart(ddp, run(tmp_path / "zero2", *case, pieces, again, "trainer=deepspeed_zero2")) < 1e-6
    assert apart(ddp, run(tmp_path / "zero3", *case, again, "trainer=deepspeed_zero3")) < 1e-6
    with pytest.raises(
        AssertionError, match=r"stage\.completions_per_pass: must be null where the strategy shards weights"
    ):
        run(tmp_path / "pieces", *case, pieces, "trainer=deepspeed_zero3")


def test_imitation_under_the_highest_level_ends_where_ddp_does(tmp_path):
    sgd = (
        "stage.optimizer._target_=torch.optim.SGD",
        "~stage.optimizer.betas",
        "~stage.optimizer.weight_decay",
    )
    case = (
        *RUN[1:],
        "+experiment=nano_sft",
        f"policy.weights={asset('policy_nano')}",
        *sgd,
        "trainer.max_steps=3",
    )
    ddp, zero = (run(tmp_path / name, *case, f"trainer={name}") for name in ("ddp", "deepspeed_zero3"))
    assert apart(ddp, zero) < 1e-6


def test_a_reference_in_half_precision_is_the_policy_that_it_was(tmp_path):
    """Its weights are cast before the engine takes them, so the divergence is exactly zero before the policy
    moves.
    """
    case = (
        *RUN,
        *SGD,
        "stage.group_size=3",
        "reference=frozen_copy",
        "stage.kl_weight=0.1",
        "trainer.precision=bf16-mixed",
    )
    for level in (2, 3):
        run(tmp_path / str(level), *case, "trainer.max_steps=2", f"trainer=deepspeed_zero{level}")
        lines = (tmp_path / str(level) / "history.jsonl").read_text().splitlines()
        first, second = (json.loads(line)["policy/kl"] for line in lines)
        assert first == 0 < second


@pytest.mark.slow
def test_a_run_goes_on_under_any_strategy(tmp_path):
    case, start = (*RUN, *ADAMW, "stage.group_size=3"), []
    whole = run(tmp_path / "whole", *case, "trainer.max_steps=4", "trainer=ddp")
    for step, name in enumerate(("ddp", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3"), 1):
        end = run(tmp_path / str(step), *case, f"trainer.max_steps={step}", f"trainer={name}", *start)
        start = [f"ckpt_path={tmp_path}/{step}/checkpoints/last.ckpt"]
    assert end["global_step"] == 4 and apart(whole, end) < 1e-6
