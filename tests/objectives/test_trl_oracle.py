"""Our objectives equal TRL's own code on the same tensors; see tests/oracles/trl_losses.py."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from segrl.objectives.advantages import group_centred, group_relative, leave_one_out
from segrl.objectives.clipped import cispo_clip, gspo_clip, ppo_clip
from segrl.objectives.gae import gae
from segrl.objectives.kl import k1, k3
from segrl.objectives.masked import per_budget, per_sequence, per_token
from segrl.objectives.policy_gradient import policy_gradient
from segrl.objectives.ppo import clipped_value_loss, whiten

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "trl_losses.json").read_text())
T = {
    name: torch.tensor(v, dtype=torch.bool if name == "mask" else torch.float64)
    for name, v in ORACLE["tensors"].items()
}
MASK, TOKENS = T["mask"], float(T["mask"].sum())
GAIN = T["advantages"][:, None].expand(MASK.shape).contiguous()
BY_TOKEN = per_token(MASK, 4, TOKENS).double()
# Our functions for each of TRL's settings: surrogate, token weights, KL weight, whether the ratio has an old
# policy, and the sign of the advantages. TRL's dapo and cispo are token means over the whole batch, here one
# rank's.
TIGHT, UP = partial(ppo_clip, low=0.2, high=0.2), partial(ppo_clip, low=0.2, high=0.3)
SEQUENCE = partial(gspo_clip, low=0.1, high=0.15)
CASES = {
    "grpo": (TIGHT, per_sequence, 0.0, True, 1),
    "grpo_on_policy_kl": (TIGHT, per_sequence, 0.04, False, 1),
    "bnpo": (UP, per_token, 0.04, True, 1),
    "bnpo_plain": (TIGHT, per_token, 0.0, True, 1),
    "dr_grpo": (TIGHT, partial(per_budget, budget=6), 0.0, True, 1),
    "dapo": (partial(ppo_clip, low=0.2, high=0.28), per_token, 0.0, True, 1),
    "dapo_plain": (TIGHT, per_token, 0.0, True, 1),
    "dapo_kl": (UP, per_token, 0.04, True, 1),
    "gspo": (SEQUENCE, per_sequence, 0.0, True, 1),
    "gspo_wide": (partial(gspo_clip, low=0.3, high=0.4), per_sequence, 0.0, True, 1),
    "gspo_negated": (SEQUENCE, per_sequence, 0.0, True, -1),
    # TRL's bound is on the ratio itself, 1.5; and its lower side is free
    "cispo": (partial(cispo_clip, low=1.0, high=0.5), per_token, 0.0, True, 1),
}


def near(found, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_no_case_of_trls_is_forgotten():
    assert set(ORACLE["grpo"]) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_policy_loss_and_its_gradient_are_trls(name):
    surrogate, weights, kl_weight, with_old, sign = CASES[name]
    expected = ORACLE["grpo"][name]
    logprobs = T["logprobs"].clone().requires_grad_()
    out = policy_gradient(
        logprobs, T["old"] if with_old else None, T["reference"] if kl_weight else None, sign * GAIN,
        weights(MASK, 4, TOKENS).double(), surrogate, k3, kl_weight,
    )  # fmt: skip
    out.loss.backward()
    near(out.loss, expected["loss"])
    near(logprobs.grad, expected["gradient"])
    assert torch.tensor(expected["gradient"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in CASES if name != "cispo"])
def test_what_we_count_is_what_trl_counts(name):
    """TRL counts tokens, or completions where the ratio is a completion's; we count shares of the loss."""
    surrogate, _, kl_weight, with_old, sign = CASES[name]
    shares = per_sequence(MASK, 4, TOKENS).double() if name.startswith("gspo") else BY_TOKEN
    old, reference = T["old"] if with_old else None, T["reference"] if kl_weight else None
    found = policy_gradient(T["logprobs"], old, reference, sign * GAIN, shares, surrogate, k3, 0.0).stats
    metrics = ORACLE["grpo"][name]["metrics"]
    near(found["clip_low"], metrics["clip_ratio/low_mean"])
    near(found["clip_high"], metrics["clip_ratio/high_mean"])
    assert with_old == (metrics["clip_ratio/region_mean"] > 0)
    assert ("kl" in found) == ("kl" in metrics)
    if "kl" in found:
        near(found["kl"], metrics["kl"])


def test_cispos_clipped_tokens_are_trls_where_the_advantage_is_positive():
    """TRL bounds the ratio of a token of negative advantage and does not count it; we count it."""
    surrogate = CASES["cispo"][0]
    clipped = surrogate(T["logprobs"], T["old"], GAIN, MASK).clipped & MASK
    counted = (clipped & (GAIN > 0)).double().sum() / TOKENS
    near(counted, ORACLE["grpo"]["cispo"]["metrics"]["cispo_clip_ratio"])
    worse = surrogate(T["logprobs"], T["old"], -GAIN.abs(), MASK).clipped & MASK
    assert counted > 0 and torch.equal(worse, clipped)


# TRL's "batch" takes the deviation of raw rewards. Ours subtracts the group's mean first, as REINFORCE++
# does.
@pytest.mark.parametrize(
    ("name", "advantage"),
    [
        ("grpo_group", partial(group_relative, floor=1e-4)),
        ("grpo_none", group_centred),
        ("rloo", leave_one_out),
        ("grpo_batch", lambda r: group_centred(r) / (r.std() + 1e-4)),
    ],
)
def test_advantages_of_groups_are_trls(name, advantage):
    near(advantage(T["group_rewards"]).flatten(), ORACLE["group_advantages"][name])


@pytest.mark.parametrize("estimator", [k1, k3])
def test_divergences_are_those_of_trls_ppo(estimator):
    near(estimator(T["logprobs"], T["reference"]), ORACLE["ppo"]["kl"][estimator.__name__])


@pytest.mark.parametrize("decay", [0.95, 1.0])
def test_advantages_and_returns_are_those_of_trls_ppo(decay):
    rewards = T["rewards"] * MASK
    found = gae(rewards, T["values"], MASK, torch.full_like(rewards, decay), 1.0)
    expected = ORACLE["ppo"][f"advantages_{decay}"]
    near(found, expected["advantages"])
    near((found + T["values"]).masked_fill(~MASK, 0), expected["returns"])
    # TRL's deviation has one less than the tokens in the denominator; the PPO stage's has all of them
    known = found[MASK]
    near(whiten(found, float(known.mean()), float(known.std())).masked_fill(~MASK, 0), expected["whitened"])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_trls_ppo_lets_one_value_behind_the_end_count_and_ours_does_if_the_mask_says_so(estimator):
    expected = ORACLE["ppo"]["rollout"][estimator]
    longer = torch.tensor(expected["value_mask"])
    rewards = torch.tensor(expected["rewards"], dtype=torch.float64)
    values = T["old_values"].masked_fill(~longer, 0)
    found = gae(rewards, values, longer, torch.full_like(values, 0.95), 1.0)
    near((found + values)[longer], torch.tensor(expected["returns"])[longer].tolist())
    known = found[MASK]
    white = whiten(found, float(known.mean()), float(known.std())).masked_fill(~MASK, 0)
    near(white, expected["advantages"])
    assert (longer & ~MASK).any()


def value_step(case, values, returns, mask):
    leaf = values.clone().requires_grad_()
    out = clipped_value_loss(
        leaf, T["old_values"], returns, per_token(mask, 4, float(mask.sum())).double(), 0.2
    )
    out.loss.backward()
    near(out.loss, case["loss"])
    near(leaf.grad, case["gradient"])
    near(out.stats["value_clip"], case["metrics"]["vf_clipfrac"])
    assert case["metrics"]["vf_clipfrac"] > 0


def policy_step(case, gain):
    leaf = T["logprobs"].clone().requires_grad_()
    out = policy_gradient(leaf, T["old"], None, gain, BY_TOKEN, TIGHT, k3, 0.0)
    out.loss.backward()
    near(out.loss, case["loss"])
    near(leaf.grad, case["gradient"])
    near(out.stats["clip_low"] + out.stats["clip_high"], case["metrics"]["pg_clipfrac"])


def test_a_step_of_ppo_is_trls():
    policy_step(ORACLE["ppo"]["policy"], GAIN)
    value_step(ORACLE["ppo"]["value"], T["values"], T["returns"], MASK)


def test_a_step_on_a_rollout_is_trls_with_advantages_of_both_signs_within_a_completion():
    step, rollout = ORACLE["ppo"]["step_on_rollout_k1"], ORACLE["ppo"]["rollout"]["k1"]
    gain, returns = (torch.tensor(rollout[name], dtype=torch.float64) for name in ("advantages", "returns"))
    assert ((gain > 0).any(1) & (gain < 0).any(1)).any()
    # the side on which nothing bounds the price: no token-level case of GRPO's has such a token
    assert ((gain < 0) & ((T["logprobs"] - T["old"]).exp() > 1.2) & MASK).any()
    policy_step(step["policy"], gain)
    value_step(step["value"], T["values"], returns, torch.tensor(rollout["value_mask"]))
