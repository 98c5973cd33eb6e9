"""Ranks, like micro-batches, change nothing: two processes on gloo end with the weights of one."""

import subprocess
import sys

import pytest
import torch

SGD = (
    "stage.optimizer._target_=torch.optim.SGD",
    "~stage.optimizer.betas",
    "~stage.optimizer.eps",
    "stage.optimizer.lr=0.05",
)
RUN = (
    "+experiment=demo", "logger=csv", "trainer.accelerator=cpu", "data.train_length=64", "data.test_length=5",
    "trainer.max_steps=4", "stage.group_size=3", "rollout.max_tokens=24", "data.workers=0",
    "stage.micro_batch_size=1", "policy.temperature=1.0", *SGD,
)  # fmt: skip
REFERENCE = ("reference=frozen_copy", "stage.kl_weight=0.01")
# Token weights by sequence; by group, with two updates a rollout; by token; and a critic whose advantages are
# whitened over ranks.
ALGORITHMS = {
    "grpo": (),
    "sam_r1": ("stage=sam_r1", *REFERENCE),
    "reinforce_pp": ("stage=reinforce_pp", *REFERENCE),
    "ppo": ("stage=ppo", *REFERENCE, "stage.critic_warmup=1", "stage.critic_lr=0.05"),
    # Groups in pieces, whose gradients add up at their prefix; everything in one pass, which shares the
    # sampler's prefix state.
    "pieces": ("stage.completions_per_pass=2", "stage.micro_batch_size=2"),
    "one_pass": ("stage.micro_batch_size=8",),
}


def run(folder, *arguments):
    command = [sys.executable, "-m", "segrl.train", *RUN, f"paths.run={folder}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr + done.stdout
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same_run(tmp_path, algorithm):
    alone = run(tmp_path / "one", *ALGORITHMS[algorithm], "data.batch_size=4")
    shared = run(
        tmp_path / "two",
        *ALGORITHMS[algorithm],
        "data.batch_size=2",
        "trainer=ddp",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
    )
    moved = run(
        tmp_path / "none",
        *ALGORITHMS[algorithm],
        "data.batch_size=4",
        "stage.optimizer.lr=1e-20",
        "test_before=false",
    )
    assert (
        max((alone[name] - moved[name]).abs().max() for name in alone) > 1e-3
    )  # it learned something to compare
    assert max((alone[name] - shared[name]).abs().max() for name in alone) < 1e-6
    for name in ("before", "after"):  # an odd number of samples: one rank has one more
        lines = [(tmp_path / ranks / "evaluation" / f"{name}.jsonl").read_text() for ranks in ("one", "two")]
        assert lines[0] == lines[1] and len(lines[0].splitlines()) == 5


def test_two_processes_equal_one(tmp_path):
    same_run(tmp_path, "sam_r1")


# The first handler runs last, when nothing but the interpreter's end is left.
LEFT = """
import atexit, glob
atexit.register(lambda: print("left:", *(open(name).read() for name in glob.glob("/proc/self/task/*/comm"))))
from segrl.{module} import main
main()
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (
            "train",
            ("+experiment=demo", *RUN[1:], "trainer.max_steps=1", "data.batch_size=2", "test_before=false"),
        ),
        (
            "evaluate",
            (
                "+suite=synthetic",
                "logger=csv",
                "testsets.synthetic.samples.length=2",
                "testsets.synthetic.published=2",
            ),
        ),
    ],
)
def test_a_rank_leaves_no_thread_of_its_group_to_the_end_of_python(tmp_path, module, arguments):
    """A thread that frees a tensor while the interpreter ends aborts the process, and with it the run."""
    (tmp_path / "main.py").write_text(LEFT.format(module=module))
    command = [sys.executable, tmp_path / "main.py", *arguments, f"paths.run={tmp_path}/run", "trainer=ddp"]
    process = subprocess.run(
        [*command, "trainer.devices=2", "trainer.accelerator=cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr + process.stdout
    assert process.stdout.count("left:") == 2 and "gloo" not in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_pp", "ppo", "pieces", "one_pass"])
def test_two_processes_equal_one_whatever_the_algorithm(tmp_path, algorithm):
    same_run(tmp_path, algorithm)
