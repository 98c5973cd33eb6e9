"""Generalised advantage estimation, the critic's loss, and a bandit that both kinds of algorithm solve."""

import math
from functools import partial
from itertools import product

import pytest
import torch

from segrl.objectives.advantages import group_relative
from segrl.objectives.clipped import ppo_clip
from segrl.objectives.gae import constant_decay, gae, segment_decay
from segrl.objectives.kl import k3
from segrl.objectives.masked import per_token
from segrl.objectives.policy_gradient import policy_gradient
from segrl.objectives.ppo import clipped_value_loss, explained_variance, whiten

D = torch.float64


def episode(seed, rows=5, width=7):
    noise = torch.Generator().manual_seed(seed)
    rewards, values, decay = (torch.rand(rows, width, generator=noise, dtype=D) for _ in range(3))
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=noise)
    return rewards * mask, values, mask, decay


def quadratic(rewards, values, mask, decay, discount):
    """Sum every later error, weighted by the product of the decays between."""
    out = torch.zeros_like(rewards)
    for n in range(len(rewards)):
        length = int(mask[n].sum())
        delta = [
            rewards[n, t] + (discount * values[n, t + 1] if t + 1 < length else 0.0) - values[n, t]
            for t in range(length)
        ]
        for t in range(length):
            out[n, t] = sum(
                delta[s] * math.prod(float(discount * decay[n, k]) for k in range(t, s))
                for s in range(t, length)
            )
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_gae_is_the_quadratic_sum(seed, discount):
    rewards, values, mask, decay = episode(seed)
    found = gae(rewards, values, mask, decay, discount)
    torch.testing.assert_close(found, quadratic(rewards, values, mask, decay, discount), rtol=0, atol=1e-12)


def test_with_decay_and_discount_one_it_is_what_is_still_to_come_less_the_value():
    rewards, values, mask, decay = episode(0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    expected = ((to_come - values) * mask).masked_fill(~mask, 0)
    torch.testing.assert_close(gae(rewards, values, mask, torch.ones_like(decay), 1.0), expected)


def test_values_and_rewards_after_the_end_change_no_advantage():
    rewards, values, mask, decay = episode(1)
    found = gae(rewards, values, mask, decay, 0.9)
    nonsense = (x.masked_fill(~mask, wrong) for x, wrong in ((rewards, 9.0), (values, -7.0)))
    other = gae(*nonsense, mask, decay.masked_fill(~mask, 3.0), 0.9)
    assert not mask.all() and (found[~mask] == 0).all()
    torch.testing.assert_close(other, found, rtol=0, atol=0)


def test_decays_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    closes = torch.tensor([[False, True, False, False]])
    assert constant_decay(mask, closes, decay=0.5).tolist() == [[0.5] * 4]
    assert segment_decay(mask, closes, decay=0.5).tolist() == [[1.0, 0.5, 1.0, 1.0]]


def tree(seed):
    """Return all completions of three tokens of two kinds, their rewards, and the potential before each
    token.

    Rewards are terminal and dense. Dense rewards are the terminal ones plus the change of the potential at
    each token. The potential is zero at both ends, so the added rewards sum to zero over each completion.
    """
    noise, paths = torch.Generator().manual_seed(seed), list(product("ab", repeat=3))
    states = {path[:t]: torch.rand(1, generator=noise).item() for path in paths for t in (1, 2)}
    before = torch.tensor([[0.0, states[path[:1]], states[path[:2]]] for path in paths], dtype=D)
    terminal = torch.zeros(8, 3, dtype=D)
    terminal[:, -1] = torch.rand(8, generator=noise, dtype=D)
    return terminal, terminal + torch.cat([before[:, 1:], torch.zeros(8, 1, dtype=D)], 1) - before, before


def exact_critic(rewards):
    """Return the exact values of a policy that draws both tokens with equal probability.

    The value before a token is the mean return over all continuations.
    """
    to_come = rewards.flip(1).cumsum(1).flip(1)
    means = [to_come[:, t].view(2**t, -1).mean(1).repeat_interleave(2 ** (3 - t)) for t in range(3)]
    return torch.stack(means, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decay", [1.0, 0.95, 0.0])
def test_with_exact_critics_dense_and_terminal_rewards_give_the_same_advantages_at_any_decay(seed, decay):
    terminal, dense, before = tree(seed)
    assert (dense - terminal).abs().max() > 0.1
    torch.testing.assert_close(dense.sum(1), terminal.sum(1))
    torch.testing.assert_close(exact_critic(dense), exact_critic(terminal) - before)
    mask = torch.ones(8, 3, dtype=torch.bool)
    found, expected = (
        gae(r, exact_critic(r), mask, torch.full_like(r, decay), 1.0) for r in (dense, terminal)
    )
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_with_one_and_the_same_critic_dense_rewards_shift_advantages_by_the_potential(seed):
    """This holds at decay 1 for any critic. The potential is known before the token, so the shift is a
    baseline.
    """
    terminal, dense, before = tree(seed)
    values = torch.rand(8, 3, generator=torch.Generator().manual_seed(seed), dtype=D)
    mask, one = torch.ones(8, 3, dtype=torch.bool), torch.ones(8, 3, dtype=D)
    torch.testing.assert_close(
        gae(dense, values, mask, one, 1.0), gae(terminal, values, mask, one, 1.0) - before
    )


def test_the_value_loss_by_hand():
    values = torch.tensor([[0.9, 0.5, 0.1, 0.0]], dtype=D, requires_grad=True)
    old, returns = torch.full((1, 4), 0.5, dtype=D), torch.tensor([[1.0, 1.0, 0.6, 0.6]], dtype=D)
    weights = torch.tensor([[0.4, 0.5, 0.0, 0.1]], dtype=D)
    out = clipped_value_loss(values, old, returns, weights, 0.2)
    # 0.9 is clipped to 0.7: max(0.01, 0.09). 0.5 is within the clip: 0.25. The third has no weight. The last
    # moved away from the return, beyond the clip, and pays in full: max(0.36, 0.09).
    assert out.loss.item() == pytest.approx(0.5 * (0.4 * 0.09 + 0.5 * 0.25 + 0.1 * 0.36))
    assert out.stats["value_clip"].item() == pytest.approx(0.4)
    out.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.25, 0.0, -0.06]], dtype=D))


def test_explained_variance_of_a_critic_that_knows_says_the_mean_or_has_nothing_to_know():
    returns, mask = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.ones(1, 4), returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(returns, torch.ones(1, 4), mask).item() == 0.0


def test_whitening_subtracts_the_mean_and_divides_by_the_deviation():
    assert whiten(torch.tensor([[1.0, 3.0]]), 2.0, 1.0).tolist() == [
        [pytest.approx(-1.0), pytest.approx(1.0)]
    ]


ARMS = torch.tensor([0.1, 0.3, 0.9, 0.4])


def pull(theta, count, noise):
    arms = torch.multinomial(theta.detach().softmax(0), count, replacement=True, generator=noise)
    return arms, ARMS[arms]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_bandit_is_solved(algorithm):
    noise = torch.Generator().manual_seed(0)
    theta, value = torch.zeros(4, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([theta, value], lr=0.05)
    mask, surrogate = torch.ones(32, 1, dtype=torch.bool), partial(ppo_clip, low=0.2, high=0.3)
    weights = per_token(mask, 8, 32.0)
    for _ in range(200):
        arms, rewards = pull(theta, 32, noise)
        old = theta.detach().log_softmax(0)[arms][:, None]
        said = value.detach().expand(32)[:, None]
        if algorithm == "grpo":
            gain = group_relative(rewards.view(4, 8), 1e-4).reshape(-1, 1)
        else:
            gain = gae(rewards[:, None], said, mask, torch.ones(32, 1), 1.0)
        for _ in range(2):
            optimizer.zero_grad()
            new = theta.log_softmax(0)[arms][:, None]
            loss = policy_gradient(new, old, None, gain, weights, surrogate, k3, 0.0).loss
            judged = clipped_value_loss(value.expand(32)[:, None], said, rewards[:, None], weights, 0.2).loss
            (loss + judged).backward()
            optimizer.step()
    assert theta.softmax(0)[2].item() > 0.95


def test_rewards_that_are_all_the_same_move_nothing():
    theta = torch.zeros(4, requires_grad=True)
    gain = group_relative(torch.full((4, 8), 0.3), 1e-4).reshape(-1, 1)
    new = theta.log_softmax(0)[torch.arange(32) % 4][:, None]
    mask = torch.ones(32, 1, dtype=torch.bool)
    surrogate = partial(ppo_clip, low=0.2, high=0.2)
    policy_gradient(new, None, None, gain, per_token(mask, 8, 32.0), surrogate, k3, 0.0).loss.backward()
    assert (theta.grad == 0).all()
