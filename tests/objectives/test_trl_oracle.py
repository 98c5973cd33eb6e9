"""Our objectives against TRL's own code on the same tensors; see tests/oracles/trl_losses.py."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from segrl.objectives.clipped import cispo_clip, gspo_clip, ppo_clip
from segrl.objectives.gae import gae
from segrl.objectives.kl import k3
from segrl.objectives.masked import per_budget, per_sequence, per_token
from segrl.objectives.policy_gradient import policy_gradient
from segrl.objectives.ppo import clipped_value_loss

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "trl_losses.json").read_text())
T = {
    name: torch.tensor(v, dtype=torch.bool if name == "mask" else torch.float64)
    for name, v in ORACLE["tensors"].items()
}
MASK, TOKENS = T["mask"], float(T["mask"].sum())
GAIN = T["advantages"][:, None].expand(MASK.shape).contiguous()
# Our pieces for each of TRL's settings: surrogate, token weights, KL weight, whether the ratio has an old policy.
CASES = {
    "grpo": (partial(ppo_clip, low=0.2, high=0.2), per_sequence, 0.0, True),
    "grpo_on_policy_kl": (partial(ppo_clip, low=0.2, high=0.2), per_sequence, 0.04, False),
    "bnpo": (partial(ppo_clip, low=0.2, high=0.3), per_token, 0.04, True),
    "dr_grpo": (partial(ppo_clip, low=0.2, high=0.2), partial(per_budget, budget=6), 0.0, True),
    "dapo": (partial(ppo_clip, low=0.2, high=0.28), per_token, 0.0, True),
    "gspo": (partial(gspo_clip, low=0.1, high=0.15), per_sequence, 0.0, True),
    "cispo": (
        partial(cispo_clip, low=1.0, high=0.5),
        per_token,
        0.0,
        True,
    ),  # TRL's bound is on the ratio itself: 1.5
}


def near(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_policy_loss_and_its_gradient_are_trls(name):
    surrogate, weights, kl_weight, with_old = CASES[name]
    expected = ORACLE["grpo"][name]
    logprobs = T["logprobs"].clone().requires_grad_()
    out = policy_gradient(
        logprobs, T["old"] if with_old else None, T["reference"] if kl_weight else None, GAIN,
        weights(MASK, 4, TOKENS).double(), surrogate, k3, kl_weight,
    )  # fmt: skip
    out.loss.backward()
    near(out.loss, expected["loss"])
    near(logprobs.grad, expected["gradient"])
    assert torch.tensor(expected["gradient"]).abs().max() > 1e-3


def test_our_clip_fractions_are_trls():
    surrogate, weights, kl_weight, _ = CASES["dapo"]
    found = policy_gradient(
        T["logprobs"], T["old"], None, GAIN, per_token(MASK, 4, TOKENS).double(), surrogate, k3, 0.0
    ).stats
    metrics = ORACLE["grpo"]["dapo"]["metrics"]
    near(found["clip_low"], metrics["clip_ratio/low_mean"])
    near(found["clip_high"], metrics["clip_ratio/high_mean"])
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize("decay", [0.95, 1.0])
def test_advantages_and_returns_are_those_of_trls_ppo(decay):
    rewards = T["rewards"] * MASK
    found = gae(rewards, T["values"], MASK, torch.full_like(rewards, decay), 1.0)
    expected = ORACLE["ppo"][f"advantages_{decay}"]
    near(found, expected["advantages"])
    near((found + T["values"]).masked_fill(~MASK, 0), expected["returns"])


def test_the_value_loss_and_its_gradient_are_trls():
    values = T["values"].clone().requires_grad_()
    out = clipped_value_loss(values, T["old_values"], T["returns"], per_token(MASK, 4, TOKENS).double(), 0.2)
    out.loss.backward()
    near(out.loss, ORACLE["ppo"]["value"]["loss"])
    near(values.grad, ORACLE["ppo"]["value"]["gradient"])


def test_ppos_policy_loss_and_its_gradient_are_trls():
    logprobs = T["logprobs"].clone().requires_grad_()
    surrogate = partial(ppo_clip, low=0.2, high=0.2)
    weights = per_token(MASK, 4, TOKENS).double()
    out = policy_gradient(logprobs, T["old"], None, GAIN, weights, surrogate, k3, 0.0)
    out.loss.backward()
    near(out.loss, ORACLE["ppo"]["policy"]["loss"])
    near(logprobs.grad, ORACLE["ppo"]["policy"]["gradient"])
