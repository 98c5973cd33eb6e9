"""A GPU that runs out of memory costs one line, with the key that takes less."""

import pytest
import torch

from segrl.segmenter import Segmenter
from segrl.stages.policy_gradient import PolicyGradientStage

SMALL = ("logger=csv", "trainer.accelerator=cpu", "data.workers=0", "data.batch_size=2", "data.test_length=2",
         "trainer.max_steps=1", "rollout.max_tokens=8")  # fmt: skip


def ran_out(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand so on")


@pytest.mark.parametrize(
    ("owner", "method", "command", "key"),
    [
        (PolicyGradientStage, "forward", ("train", "+experiment=demo", "test_before=false", *SMALL),
         "stage.micro_batch_size"),
        (Segmenter, "__call__", ("train", "+experiment=demo", *SMALL), "data.module.eval_batch_size"),
        (
            Segmenter, "__call__",
            ("evaluate", "+suite=synthetic", "testsets.synthetic.samples.length=2",
             "testsets.synthetic.published=2", "logger=csv"),
            "suite.batch_size",
        ),
    ],
)  # fmt: skip
def test_the_line_names_the_key(cli, monkeypatch, owner, method, command, key):
    monkeypatch.setattr(owner, method, ran_out)
    module, *arguments = command
    code, _, err = cli(*arguments, module=module)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("segrl: ")]
    assert (
        line.startswith(f"segrl: {key}: ")
        and "Tried to allocate 2.00 GiB" in line
        and "docs/speed.md" in line
    )
