from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segrl.objectives.advantages import group_relative

# Sixteenths: sums and shifts by whole numbers are exact in float32, so equality below is equality.
sixteenths = st.integers(0, 32).map(lambda n: n / 16)
groups = st.integers(2, 8).flatmap(
    lambda g: st.lists(st.lists(sixteenths, min_size=g, max_size=g), min_size=1, max_size=4).map(torch.tensor)
)


def test_a_group_by_hand() -> None:
    # mean 2, deviation with n-1 exactly 1, floor 1: (r - 2) / 2
    out = group_relative(torch.tensor([[1.0, 2.0, 3.0]]), floor=1.0)
    torch.testing.assert_close(out, torch.tensor([[-0.5, 0.0, 0.5]]), rtol=0, atol=1e-7)


def test_the_deviation_has_one_less_than_the_group_in_the_denominator() -> None:
    # mean 1/4, squares 3/16 + 9/16 = 3/4, over 3: 1/4, root 1/2
    out = group_relative(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), floor=0.0)
    torch.testing.assert_close(out, torch.tensor([[-0.5, -0.5, -0.5, 1.5]]), rtol=0, atol=1e-6)


def test_trls_floor_makes_noise_of_its_size_an_advantage_of_about_one_half() -> None:
    noise = 1e-4 / 2**0.5  # two rewards this far apart from their mean deviate by 1e-4
    out = group_relative(torch.tensor([[-noise, noise]]), floor=1e-4)
    torch.testing.assert_close(out, torch.tensor([[-1.0, 1.0]]) * noise / 2e-4, rtol=1e-5, atol=0)


@pytest.mark.parametrize("floor", [0.0, 1e-4])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.7, -2.3])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_a_group_without_spread_gives_exactly_zero(value: float, size: int, floor: float) -> None:
    assert group_relative(torch.full((2, size), value), floor).tolist() == [[0.0] * size] * 2


def test_a_group_without_spread_does_not_silence_its_neighbour() -> None:
    out = group_relative(torch.tensor([[0.3, 0.3, 0.3], [1.0, 2.0, 3.0]]), floor=0.0)
    assert out[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(out[1], torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=1e-6)


@given(groups, st.integers(-4, 4))
def test_shifting_all_rewards_of_a_group_changes_nothing(rewards: torch.Tensor, shift: int) -> None:
    shifted = rewards.clone()
    shifted[0] += shift
    torch.testing.assert_close(
        group_relative(shifted, 1e-4), group_relative(rewards, 1e-4), rtol=0, atol=2e-5
    )


@given(groups, st.randoms(use_true_random=False))
def test_permuting_a_group_permutes_its_advantages(rewards: torch.Tensor, random: object) -> None:
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    torch.testing.assert_close(
        group_relative(rewards[:, order], 1e-4), group_relative(rewards, 1e-4)[:, order], rtol=0, atol=2e-5
    )


@given(groups)
def test_groups_do_not_see_each_other(rewards: torch.Tensor) -> None:
    alone = torch.cat([group_relative(row[None], 1e-4) for row in rewards])
    torch.testing.assert_close(group_relative(rewards, 1e-4), alone, rtol=0, atol=1e-6)


@given(groups)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(rewards: torch.Tensor) -> None:
    out = group_relative(rewards, 1e-4)
    torch.testing.assert_close(out.sum(1), torch.zeros(len(out)), rtol=0, atol=1e-4)
    better = rewards[:, :, None] > rewards[:, None, :]
    assert (out[:, :, None] > out[:, None, :])[better].all()


@given(groups)
def test_scaling_rewards_changes_nothing_without_a_floor(rewards: torch.Tensor) -> None:
    torch.testing.assert_close(
        group_relative(rewards * 4, 0.0), group_relative(rewards, 0.0), rtol=0, atol=2e-5
    )


def test_a_group_of_one_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(ValueError, match=r"stage\.group_size.*at least 2.*got 1"):
        group_relative(torch.zeros(3, 1), 1e-4)
