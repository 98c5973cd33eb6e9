"""Surrogates, divergences, advantages and token weights other than GRPO's."""

import math
from functools import partial

import pytest
import torch

from segrl.objectives import advantages as adv
from segrl.objectives.clipped import cispo_clip, gspo_clip, ppo_clip, sequence_ratio
from segrl.objectives.kl import k1, k2, k3
from segrl.objectives.masked import per_budget, per_group, per_sequence, per_token, weighted_sum
from segrl.objectives.policy_gradient import policy_gradient

D = torch.float64


def row(*values):
    return torch.tensor([values], dtype=D)


def ones(x):
    return torch.ones_like(x, dtype=torch.bool)


def ragged(seed, rows=8, width=6):
    noise = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=noise, dtype=D)
    new = old + 0.4 * torch.randn(rows, width, generator=noise, dtype=D)
    gain = torch.randn(rows, 1, generator=noise, dtype=D).expand(rows, width).contiguous()
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=noise)
    return new, old, gain, mask


def test_a_dual_clip_bounds_negative_advantages_alone():
    ratio = row(10.0, 2.0, 10.0)
    gain = row(-1.0, -1.0, 1.0)
    free = ppo_clip(ratio.log(), torch.zeros_like(ratio), gain, ones(ratio), low=0.2, high=0.2)
    dual = ppo_clip(ratio.log(), torch.zeros_like(ratio), gain, ones(ratio), low=0.2, high=0.2, dual=3.0)
    torch.testing.assert_close(free.loss, row(10.0, 2.0, -1.2))
    torch.testing.assert_close(dual.loss, row(3.0, 2.0, -1.2))
    assert dual.clipped.tolist() == [[True, False, True]]


def test_beyond_the_dual_clip_there_is_no_gradient():
    ratio, gain = row(10.0, 2.0), row(-1.0, -1.0)
    leaf = ratio.log().requires_grad_()
    ppo_clip(
        leaf, torch.zeros_like(leaf), gain, ones(leaf), low=0.2, high=0.2, dual=3.0
    ).loss.sum().backward()
    torch.testing.assert_close(leaf.grad, row(0.0, 2.0))


@pytest.mark.parametrize(("dual", "high"), [(None, 0.1), (1.4, 0.4)])
def test_clipped_tokens_are_counted_by_side(dual, high):
    # clipped: the first above, the second below; with a dual clip at 1.4 the third, too, above
    new, gain = row(1.5, 0.5, 1.5, 0.5).log(), row(1.0, -1.0, -1.0, 1.0)
    surrogate = partial(ppo_clip, low=0.2, high=0.2, dual=dual)
    old, weights = torch.zeros_like(new), row(0.1, 0.2, 0.3, 0.4)
    stats = policy_gradient(new, old, None, gain, weights, surrogate, k3, 0.0).stats
    assert stats["clip_low"].item() == pytest.approx(0.2)
    assert stats["clip_high"].item() == pytest.approx(high)
    assert stats["drift"].item() == pytest.approx(-0.4 * math.log(1.5) - 0.6 * math.log(0.5))


def test_gspo_has_one_ratio_per_completion_the_geometric_mean_without_the_padding():
    new, old = row(-1.0, -2.0, -50.0), row(-2.0, -2.5, -1.0)
    mask = torch.tensor([[True, True, False]])
    assert sequence_ratio(new, old, mask).tolist() == [[pytest.approx(math.exp(0.75))] * 3]
    out = gspo_clip(new, old, row(1.0, 1.0, 1.0), mask, low=0.1, high=0.1)
    assert out.loss[0, 0].item() == pytest.approx(-1.1) and out.clipped.all()


def test_cispo_keeps_the_gradient_of_clipped_tokens_and_lets_none_through_the_ratio():
    new = row(0.0, 0.0, 0.0).requires_grad_()
    old = -row(3.0, 1.0, 0.5).log()
    gain = row(1.0, 1.0, -2.0)
    out = cispo_clip(new, old, gain, ones(new), low=0.2, high=1.0)
    out.loss.sum().backward()
    assert out.clipped.tolist() == [[True, False, True]]
    torch.testing.assert_close(new.grad, -row(2.0, 1.0, 0.8) * gain)


@pytest.mark.parametrize("surrogate", [ppo_clip, gspo_clip, cispo_clip])
def test_at_the_first_update_every_surrogate_is_reinforce(surrogate):
    new, _, gain, mask = ragged(0)
    new.requires_grad_()
    out = surrogate(new, new.detach(), gain, mask, low=0.2, high=0.3)
    weights = per_sequence(mask, 4, 0.0).double()
    weighted_sum(out.loss, weights).backward()
    assert (out.ratio == 1).all() and not out.clipped.any()
    torch.testing.assert_close(new.grad, -gain * weights, rtol=0, atol=1e-12)


def test_divergences_by_hand():
    new, reference = row(-1.0, -2.0), row(-2.0, -1.0)
    torch.testing.assert_close(k1(new, reference), row(1.0, -1.0))
    torch.testing.assert_close(k2(new, reference), row(0.5, 0.5))
    torch.testing.assert_close(k3(new, reference), row(1 / math.e, math.e - 2))


def test_k1_and_k3_mean_the_divergence_and_k2_and_k3_are_never_negative():
    policy, reference = row(0.5, 0.3, 0.15, 0.05), row(0.25, 0.25, 0.4, 0.1)
    true = (policy * (policy / reference).log()).sum().item()
    for estimate in (k1, k3):
        mean = (policy * estimate(policy.log(), reference.log())).sum().item()
        assert mean == pytest.approx(true, abs=1e-12)
    assert all((estimate(policy.log(), reference.log()) >= 0).all() for estimate in (k2, k3))


RELATIVE = {
    "group_relative": partial(adv.group_relative, floor=1e-4),
    "group_centred": adv.group_centred,
    "leave_one_out": adv.leave_one_out,
    "batch_normalised": partial(adv.batch_normalised, floor=1e-8),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_advantages_know_only_what_is_relative(name):
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    rewards[1] = 0.7
    found = RELATIVE[name](rewards)
    assert (found[1] == 0).all() and found[0].abs().min() > 0
    torch.testing.assert_close(found.sum(1), torch.zeros(3), rtol=0, atol=1e-5)
    shift = torch.tensor([[5.0], [-2.0], [1.0]])  # each group by its own
    torch.testing.assert_close(RELATIVE[name](rewards + shift), found, rtol=0, atol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(RELATIVE[name](rewards[:, order]), found[:, order], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        RELATIVE[name](rewards[:, :1])


def test_centred_and_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert adv.group_centred(rewards).tolist() == [[-2.0, -1.0, 3.0]]
    assert adv.leave_one_out(rewards).tolist() == [[1 - 4.0, 2 - 3.5, 6 - 1.5]]


def test_leave_one_out_is_a_loop_over_the_others():
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(2), dtype=D)
    loop = [[x - sum(r[:g] + r[g + 1 :]) / 3 for g, x in enumerate(r)] for r in rewards.tolist()]
    torch.testing.assert_close(adv.leave_one_out(rewards), torch.tensor(loop, dtype=D))


def test_one_deviation_for_the_whole_batch():
    rewards = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    deviation = torch.tensor([-1.0, 1.0, -2.0, 2.0]).std()
    torch.testing.assert_close(
        adv.batch_normalised(rewards, 1e-8), torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]) / deviation
    )


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, False]])
    assert per_group(mask, 2, 0.0)[:, 0].tolist() == [0.125] * 4
    assert per_budget(mask, 2, 0.0, budget=5)[0].tolist() == [pytest.approx(0.05)] * 3
    assert per_token(mask, 2, 8.0)[3].tolist() == [0.125, 0.125, 0.0]
    uneven = torch.tensor(
        [[True, True, True], [True, False, False], [True, False, False], [True, False, False]]
    )
    assert per_group(uneven, 2, 0.0)[:, 0].tolist() == [0.125, 0.125, 0.25, 0.25]


@pytest.mark.parametrize("seed", range(3))
def test_weights_by_group_and_by_budget_are_a_loop_over_groups(seed):
    mask = ragged(seed)[3]
    mask[2:4] = False  # a group of which nothing counts
    by_group, by_budget = torch.zeros(8, 6), torch.zeros(8, 6)
    for first in range(0, 8, 2):
        tokens = [(n, t) for n in (first, first + 1) for t in range(6) if mask[n, t]]
        for n, t in tokens:
            by_group[n, t] = 1 / len(tokens) / 4
            by_budget[n, t] = 1 / (8 * 6)
    torch.testing.assert_close(per_group(mask, 2, 0.0), by_group)
    torch.testing.assert_close(per_budget(mask, 2, 0.0, budget=6), by_budget)


@pytest.mark.parametrize("weights", [per_sequence, per_token, per_group, partial(per_budget, budget=6)])
def test_two_ranks_average_to_the_gradient_of_one(weights):
    """Each rank has half of the samples and the mean of the counts; the ranks' gradients are averaged."""
    new, old, gain, mask = ragged(3)
    surrogate = partial(ppo_clip, low=0.2, high=0.3)

    def gradient(rows, tokens):
        leaf = new[rows].clone().requires_grad_()
        term = surrogate(leaf, old[rows], gain[rows], mask[rows])
        weighted_sum(term.loss, weights(mask[rows], 2, tokens).double()).backward()
        return leaf.grad

    whole = gradient(slice(None), float(mask.sum()))
    halves = [gradient(rows, float(mask.sum()) / 2) for rows in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.cat(halves) / 2, whole, rtol=0, atol=1e-6)
    assert whole.abs().max() > 1e-2
