"""Write what TRL's own code makes of small fixed tensors: GRPO, RLOO and PPO losses, gradients and
advantages.

    uv run --no-project --with trl==1.12.0 --with torch==2.13.0 --with requests tests/oracles/trl_losses.py

writes trl_losses.json beside this file. 1.12.0 is the last release with PPO. In 1.16.0 the code of GRPO and
RLOO that runs here differs by one comment. A trainer is never initialised, only given what its
`_compute_loss` reads. Code inside a longer method (PPO's loop, the advantages of a group) is cut out of TRL's
source and executed.
"""

import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.ppo import ppo_trainer
from trl.trainer import grpo_trainer, rloo_trainer

LENGTHS = [6, 3, 1, 4, 5, 2, 6, 2]
PPO = (ppo_trainer, ppo_trainer.PPOTrainer.train)


def tensors():
    """Return fixed float64 tensors in groups of 4."""
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
        "group_rewards": torch.rand(2, rows // 2, dtype=torch.float64),
    }


def compute_loss(trainer_class, given, inputs, settings):
    """Return loss, gradient and metrics of `_compute_loss` of a trainer with the given settings."""
    logprobs = given["logprobs"].clone().requires_grad_()
    trainer = trainer_class.__new__(trainer_class)
    attributes = {
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        ),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        **settings,
    }
    for name, value in attributes.items():
        object.__setattr__(trainer, name, value)
    ids = torch.zeros(given["mask"].shape, dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": given["mask"].long(),
        **inputs,
    }
    loss = trainer._compute_loss(None, batch)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items() if name != "entropy"}
    return {"loss": loss.item(), "gradient": logprobs.grad.tolist(), "metrics": metrics}


def grpo(given, loss_type, level="token", low=0.2, high=0.2, beta=0.0, old=True, sign=1):
    """Return one loss of the GRPO family."""
    settings = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": low,
        "epsilon_high": high,
        "beta": beta,
        "max_completion_length": max(LENGTHS),
    }
    inputs = {
        "advantages": sign * given["advantages"],
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": given["mask"].sum().double(),
        **({"old_per_token_logps": given["old"]} if old else {}),
    }
    return {
        "settings": {**settings, "old": old, "sign": sign},
        **compute_loss(GRPOTrainer, given, inputs, settings),
    }


def rloo(given, low=0.2, high=0.2, sign=1):
    """Return RLOO's loss: one ratio per completion, of the sums of its tokens' log-probabilities."""
    settings = {"epsilon_low": low, "epsilon_high": high}
    inputs = {"advantages": sign * given["advantages"], "old_logps": (given["old"] * given["mask"]).sum(1)}
    return {"settings": {**settings, "sign": sign}, **compute_loss(RLOOTrainer, given, inputs, settings)}


def execute(origin, first, last, **names):
    """Run the lines of a method from the one that starts with `first` to the one with `last`; return the
    names.
    """
    module, method = origin
    source = inspect.getsource(method).splitlines()
    start = next(i for i, line in enumerate(source) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(source) if i >= start and line.strip().startswith(last))
    space = {**vars(module), **names}
    exec(textwrap.dedent("\n".join(source[start : end + 1])), space)  # TRL's own lines
    return space


def group_advantages(given, trainer_class, module, first, **attributes):
    """Return advantages per completion from the rewards of the groups."""
    rewards = given["group_rewards"].view(-1, 1)
    origin = (module, trainer_class._generate_and_score_completions)
    space = execute(
        origin, first, "advantages = torch.nan_to_num(",
        self=SimpleNamespace(
            reward_weights=torch.ones(1, dtype=torch.float64), reward_funcs=[None], reward_clip_range=None,
            beta=0.0, multi_objective_aggregation="sum_then_normalize", **attributes,
        ),
        rewards_per_func=rewards, unscorable_mask=torch.isnan(rewards).all(dim=1), device="cpu",
        num_generations=given["group_rewards"].shape[1],
    )  # fmt: skip
    return space["advantages"].tolist()


def ppo_kl(given, estimator):
    """Return the KL estimate per token, padding included."""
    space = execute(
        PPO, "logr = ", "kl = ", logprobs=given["logprobs"], ref_logprobs=given["reference"],
        args=SimpleNamespace(kl_estimator=estimator),
    )  # fmt: skip
    return space["kl"].tolist()


def ppo_advantages(given, decay):
    """Return advantages before and after whitening, and returns.

    The values and rewards of padding are 0.
    """
    padding = ~given["mask"]
    space = execute(
        PPO, "lastgaelam = 0", "returns = ",
        values=given["values"].masked_fill(padding, 0), rewards=given["rewards"] * given["mask"],
        responses=given["rewards"], args=SimpleNamespace(gamma=1.0, lam=decay),
    )  # fmt: skip
    white = execute(
        PPO, "advantages = masked_whiten(", "advantages = torch.masked_fill(",
        advantages=space["advantages"], padding_mask=padding,
    )  # fmt: skip
    found = {name: space[name].masked_fill(padding, 0).tolist() for name in ("advantages", "returns")}
    return {**found, "whitened": white["advantages"].tolist()}


def ppo_rollout(given, estimator, decay=0.95, kl_coef=0.05):
    """Return whitened advantages from the scores of the completions, with TRL's masks.

    A value one past the end counts.
    """
    space = execute(
        PPO, "response_idxs = ", "advantages = torch.masked_fill(",
        responses=given["logprobs"], sequence_lengths=torch.tensor(LENGTHS) - 1, logprobs=given["old"],
        ref_logprobs=given["reference"], values=given["old_values"], scores=given["group_rewards"].view(-1),
        args=SimpleNamespace(kl_estimator=estimator, kl_coef=kl_coef, whiten_rewards=False, gamma=1.0,
                             lam=decay),
    )  # fmt: skip
    found = {name: space[name] for name in ("kl", "rewards", "advantages", "returns")}
    return {**found, "value_mask": ~space["padding_mask_p1"]}


def ppo_step(given, advantages, returns, value_mask, clip=0.2):
    """Return the losses of one minibatch with the gradient of each.

    They share no input, so the gradients are those of their sum.
    """
    padding, settings = ~given["mask"], {"cliprange": clip, "cliprange_value": clip, "vf_coef": 1.0}
    logprobs, values = given["logprobs"].clone().requires_grad_(), given["values"].clone().requires_grad_()
    column = torch.zeros(len(LENGTHS), 1, dtype=torch.float64)
    space = execute(
        PPO, "new_logprobs = torch.masked_fill(", "approxkl = ",
        new_logprobs=logprobs, vpred_temp=torch.cat([values, column], 1)[..., None], context_length=1,
        padding_mask=padding, padding_mask_p1=~value_mask, micro_batch_inds=slice(None),
        mb_logprobs=given["old"].masked_fill(padding, ppo_trainer.INVALID_LOGPROB),
        mb_values=given["old_values"].masked_fill(~value_mask, 0), mb_return=returns, mb_advantage=advantages,
        args=SimpleNamespace(**settings), logits=torch.zeros(*padding.shape, 2),
        accelerator=SimpleNamespace(backward=lambda loss: loss.backward()),
        optimizer=SimpleNamespace(step=lambda: None, zero_grad=lambda: None),
    )  # fmt: skip
    policy = {name: space[name].item() for name in ("pg_clipfrac", "approxkl")}
    value = {"vf_clipfrac": space["vf_clipfrac"].item()}
    found = {
        "policy": {"loss": space["pg_loss"].item(), "gradient": logprobs.grad.tolist(), "metrics": policy},
        "value": {"loss": space["vf_loss"].item(), "gradient": values.grad.tolist(), "metrics": value},
    }
    found["policy"]["settings"], found["value"]["settings"] = settings, {**settings, "scale": 0.5}
    return found


def main():
    """Write the fixture."""
    given = tensors()
    rollouts = {estimator: ppo_rollout(given, estimator) for estimator in ("k1", "k3")}
    past = {name: rollouts["k1"][name] for name in ("advantages", "returns", "value_mask")}
    grouped = [(f"grpo_{how}", GRPOTrainer, grpo_trainer, "if self.multi_objective", {"scale_rewards": how})
               for how in ("group", "batch", "none")]  # fmt: skip
    grouped += [(name, RLOOTrainer, rloo_trainer, "rewards = (rewards_per_func",
                 {"normalize_advantages": white})
                for name, white in (("rloo", False), ("rloo_normalized", True))]  # fmt: skip
    found = {
        "trl": trl.__version__,
        "tensors": {name: value.tolist() for name, value in given.items()},
        "grpo": {
            "grpo": grpo(given, "grpo"),
            "grpo_on_policy_kl": grpo(given, "grpo", beta=0.04, old=False),
            "bnpo": grpo(given, "bnpo", high=0.3, beta=0.04),
            "bnpo_plain": grpo(given, "bnpo"),
            "dr_grpo": grpo(given, "dr_grpo"),
            "dapo": grpo(given, "dapo", high=0.28),
            "dapo_plain": grpo(given, "dapo"),
            "dapo_kl": grpo(given, "dapo", high=0.3, beta=0.04),
            "gspo": grpo(given, "grpo", level="sequence", low=0.1, high=0.15),
            "gspo_wide": grpo(given, "grpo", level="sequence", low=0.3, high=0.4),
            # No completion with a positive advantage has a ratio above the bound; with advantages negated,
            # one has.
            "gspo_negated": grpo(given, "grpo", level="sequence", low=0.1, high=0.15, sign=-1),
            "cispo": grpo(given, "cispo", high=1.5),
        },
        "rloo": {"rloo": rloo(given), "rloo_negated": rloo(given, high=0.1, sign=-1)},
        "group_advantages": {
            name: group_advantages(given, kind, module, first, **how)
            for name, kind, module, first, how in grouped
        },
        "ppo": {
            "kl": {estimator: ppo_kl(given, estimator) for estimator in rollouts},
            "advantages_0.95": ppo_advantages(given, 0.95),
            "advantages_1.0": ppo_advantages(given, 1.0),
            **ppo_step(given, given["advantages"][:, None], given["returns"], given["mask"]),
            "rollout": {name: {k: v.tolist() for k, v in out.items()} for name, out in rollouts.items()},
            "step_on_rollout_k1": ppo_step(given, **past),
        },
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
