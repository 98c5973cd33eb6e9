"""Importance weights between an engine and the training pass."""

import torch

from segrl.objectives.mismatch import truncated_importance


def test_weights_are_ratios_up_to_the_cap():
    old = torch.tensor([[0.0, -1.0, -1.0, -5.0]])
    drawn = torch.tensor([[0.0, -2.0, -0.5, float("-inf")]])
    weights = torch.tensor([[0.25, 0.25, 0.5, 0.0]])
    out = truncated_importance(old, drawn, weights, 2.0)
    expected = torch.tensor(
        [[1.0, 2.0, 2.718281828**-0.5, 1.0]]
    )  # e is above the cap; the last does not count
    torch.testing.assert_close(out, expected)


def test_no_gradient_flows_through_the_weights():
    old = torch.zeros(1, 2, requires_grad=True)
    assert not truncated_importance(old, torch.zeros(1, 2), torch.ones(1, 2), 2.0).requires_grad
