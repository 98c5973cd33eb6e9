from __future__ import annotations

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segrl.objectives import masked
from segrl.objectives.masked import weighted_sum
from segrl.objectives.sft import sft


def per_sequence(mask: torch.Tensor) -> torch.Tensor:
    return masked.per_sequence(mask, 1, 0.0)


def per_token(mask: torch.Tensor) -> torch.Tensor:
    return masked.per_token(mask, 1, float(mask.sum()))


MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def masks(least: int) -> st.SearchStrategy[torch.Tensor]:
    """Draw right-padded masks of 1 to 6 completions with `least` or more tokens each."""
    rows = st.lists(st.integers(least, 7), min_size=1, max_size=6)
    return rows.map(lambda lengths: torch.arange(7) < torch.tensor(lengths)[:, None])


def test_per_sequence_is_the_mean_over_tokens_then_over_completions() -> None:
    expected = [[0.125, 0.125, 0.125, 0.125], [0.25, 0.25, 0.0, 0.0]]
    torch.testing.assert_close(per_sequence(MASK), torch.tensor(expected))


def test_per_token_is_the_mean_over_all_tokens() -> None:
    sixth = 1 / 6
    torch.testing.assert_close(per_token(MASK), torch.tensor([[sixth] * 4, [sixth, sixth, 0.0, 0.0]]))


def test_a_completion_without_tokens_has_no_weight_and_counts_in_the_mean() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    torch.testing.assert_close(per_sequence(mask), torch.tensor([[0.25, 0.25], [0.0, 0.0]]))
    torch.testing.assert_close(per_token(mask), torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


def test_no_token_at_all_weighs_zero_and_divides_by_nothing() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for weights in (per_sequence(mask), per_token(mask)):
        torch.testing.assert_close(weights, torch.zeros(2, 3))


@given(masks(least=1))
def test_shares_sum_to_one_and_lie_on_the_mask_only(mask: torch.Tensor) -> None:
    for weights in (per_sequence(mask), per_token(mask)):
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0), rtol=0, atol=1e-6)
        assert (weights[~mask] == 0).all()
        assert (weights[mask] > 0).all()


@given(masks(least=1))
def test_per_sequence_gives_every_completion_the_same_share(mask: torch.Tensor) -> None:
    torch.testing.assert_close(per_sequence(mask).sum(1), torch.full((len(mask),), 1 / len(mask)))


def test_weighted_sum_is_the_sum_of_products() -> None:
    values, weights = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.25], [0.0, 0.25]])
    assert weighted_sum(values, weights).item() == 1.0


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
def test_a_value_of_no_weight_cannot_enter_the_sum_or_its_gradient(poison: float) -> None:
    values = torch.tensor([[1.0, poison], [3.0, 4.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.25]])
    total = weighted_sum(values, weights)
    total.backward()
    assert total.item() == 0.5 + 0.75 + 1.0
    assert values.grad.tolist() == weights.tolist()


def test_the_sft_loss_is_the_weighted_cross_entropy_of_the_answer() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -7.0, float("-inf"), 9.0]], requires_grad=True)
    out = sft(logprobs, per_sequence(MASK))
    out.loss.backward()
    assert out.loss.item() == pytest.approx((1 + 2 + 3 + 4) / 8 + (5 + 7) / 4)
    assert out.stats["loss"].item() == out.loss.item()
    torch.testing.assert_close(logprobs.grad, -per_sequence(MASK))


def test_shapes_are_checked_in_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        weighted_sum(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        per_token(torch.ones(2, 3))
