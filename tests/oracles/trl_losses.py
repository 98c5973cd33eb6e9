"""What TRL's own code makes of small fixed tensors: losses and gradients of its GRPO and PPO trainers.

    uv run --no-project --with trl==1.12.0 --with torch==2.13.0 --with requests tests/oracles/trl_losses.py

writes trl_losses.json beside this file. GRPO: `GRPOTrainer._compute_loss`, called on a trainer that was never initialised and
given only what it reads. PPO: its lines stand inside `PPOTrainer.train`, so they are cut out of its source and executed.
"""

import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import GRPOTrainer
from trl.experimental.ppo import ppo_trainer

LENGTHS = [6, 3, 1, 4, 5, 2, 6, 2]


def tensors():
    """float64, groups of 4."""
    torch.manual_seed(0)
    rows, width = len(LENGTHS), max(LENGTHS)
    logprobs = -3 * torch.rand(rows, width, dtype=torch.float64)
    return {
        "mask": torch.arange(width) < torch.tensor(LENGTHS)[:, None],
        "logprobs": logprobs,
        "old": logprobs + 0.6 * torch.randn(rows, width, dtype=torch.float64),
        "reference": logprobs + 0.3 * torch.randn(rows, width, dtype=torch.float64),
        "advantages": torch.randn(rows, dtype=torch.float64),
        "values": torch.rand(rows, width, dtype=torch.float64),
        "old_values": torch.rand(rows, width, dtype=torch.float64),
        "returns": torch.rand(rows, width, dtype=torch.float64),
        "rewards": torch.rand(rows, width, dtype=torch.float64),
    }


def grpo(given, *, loss_type, level="token", low=0.2, high=0.2, beta=0.0, old=True):
    """Loss and gradient of one case."""
    logprobs = given["logprobs"].clone().requires_grad_()
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    settings = {
        "loss_type": loss_type, "importance_sampling_level": level, "epsilon_low": low, "epsilon_high": high, "beta": beta,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False, "aux_loss_enabled": False,
        "vllm_importance_sampling_correction": False, "_entropy_bonus_enabled": False, "max_completion_length": 6,
        "current_gradient_accumulation_steps": 1, "accelerator": accelerator, "args": args, "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    }  # fmt: skip
    for name, value in settings.items():
        object.__setattr__(trainer, name, value)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": given["mask"].long(),
        "advantages": given["advantages"], "ref_per_token_logps": given["reference"],
        "num_items_in_batch": given["mask"].sum().double(), **({"old_per_token_logps": given["old"]} if old else {}),
    }  # fmt: skip
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    metrics = {
        name: values[0] for name, values in trainer._metrics["train"].items() if "nan" not in str(values)
    }
    return {"loss": loss.item(), "gradient": logprobs.grad.tolist(), "metrics": metrics}


def lines(first, last):
    """The lines of PPO's training loop from the one that starts with `first` to the one that starts with `last`."""
    source = inspect.getsource(ppo_trainer.PPOTrainer.train).splitlines()
    start = next(i for i, line in enumerate(source) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(source) if i >= start and line.strip().startswith(last))
    return textwrap.dedent("\n".join(source[start : end + 1]))


def execute(code, **names):
    """The names after the code ran."""
    space = {**vars(ppo_trainer), **names}
    exec(code, space)  # TRL's own lines
    return space


def ppo_advantages(given, decay):
    """Before whitening, and the returns."""
    space = execute(
        lines("lastgaelam = 0", "returns = "),
        values=given["values"].masked_fill(~given["mask"], 0), rewards=given["rewards"] * given["mask"],
        responses=given["rewards"], args=SimpleNamespace(gamma=1.0, lam=decay),
    )  # fmt: skip
    keep = given["mask"]
    return {name: space[name].masked_fill(~keep, 0).tolist() for name in ("advantages", "returns")}


def ppo_value(given, clip):
    """Loss and gradient."""
    values = given["values"].clone().requires_grad_()
    space = execute(
        lines("vpredclipped = ", "vf_loss = "),
        vpred=values, mb_values=given["old_values"], mb_return=given["returns"], args=SimpleNamespace(cliprange_value=clip),
        padding_mask_p1=~given["mask"], micro_batch_inds=slice(None),
    )  # fmt: skip
    space["vf_loss"].backward()
    return {"loss": space["vf_loss"].item(), "gradient": values.grad.tolist()}


def ppo_policy(given, clip):
    """Loss and gradient."""
    logprobs = given["logprobs"].clone().requires_grad_()
    space = execute(
        lines("logprobs_diff = ", "pg_loss = "),
        new_logprobs=logprobs, mb_logprobs=given["old"], mb_advantage=given["advantages"][:, None],
        args=SimpleNamespace(cliprange=clip), padding_mask=~given["mask"], micro_batch_inds=slice(None),
    )  # fmt: skip
    space["pg_loss"].backward()
    return {"loss": space["pg_loss"].item(), "gradient": logprobs.grad.tolist()}


def main():
    """Write the fixture."""
    import trl

    given = tensors()
    found = {
        "trl": trl.__version__,
        "tensors": {name: value.tolist() for name, value in given.items()},
        "grpo": {
            "grpo": grpo(given, loss_type="grpo"),
            "grpo_on_policy_kl": grpo(given, loss_type="grpo", beta=0.04, old=False),
            "bnpo": grpo(given, loss_type="bnpo", high=0.3, beta=0.04),
            "dr_grpo": grpo(given, loss_type="dr_grpo"),
            "dapo": grpo(given, loss_type="dapo", high=0.28),
            "gspo": grpo(given, loss_type="grpo", level="sequence", low=0.1, high=0.15),
            "cispo": grpo(given, loss_type="cispo", high=1.5),
        },
        "ppo": {
            "advantages_0.95": ppo_advantages(given, 0.95),
            "advantages_1.0": ppo_advantages(given, 1.0),
            "value": ppo_value(given, 0.2),
            "policy": ppo_policy(given, 0.2),
        },
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
