"""Products by oneDNN are torch's, values and gradients; elsewhere than in float32 on a CPU torch makes them."""

import pytest
import torch
from torch import nn

from segrl.models import products
from segrl.models.products import Linear, add_columns_by_columns, rows_by_rows


@pytest.fixture
def calls(monkeypatch):
    seen, made = [], products._by_onednn
    monkeypatch.setattr(products, "_by_onednn", lambda *given: seen.append(made(*given)) or seen[-1])
    return seen


@pytest.mark.parametrize("shape", [(1, 48), (63, 48), (2, 5, 48), (0, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_torchs(shape, bias, calls):
    torch.manual_seed(0)
    theirs = nn.Linear(48, 20, bias)
    ours = Linear(theirs)
    assert isinstance(ours, nn.Linear) and ours.weight is theirs.weight
    outcomes = []
    for layer in (theirs, ours):
        layer.zero_grad()
        given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(given)
        (out * torch.linspace(-1, 1, 20)).sum().backward()
        outcomes.append([out.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert any(calls) == (0 not in shape)


def test_what_is_frozen_gets_no_gradient():
    layer, given = Linear(nn.Linear(8, 4)).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    layer(given).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and given.grad is not None
    layer.weight.requires_grad_()
    layer(given.detach()).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is None


def test_half_precision_and_others_are_torchs(calls):
    layer = Linear(nn.Linear(8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
    assert Linear(nn.Linear(8, 4, dtype=torch.float64))(torch.randn(3, 8).double()).dtype == torch.float64
    assert calls and not any(calls)


def test_views_are_read_as_they_are():
    one, other, total = torch.randn(30, 7), torch.randn(30, 11), torch.randn(7, 11)
    torch.testing.assert_close(rows_by_rows(one.t(), other.t()), one.t() @ other, rtol=1e-5, atol=1e-5)
    expected = total + one.t() @ other
    add_columns_by_columns(total, one, other)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_every_linear_layer_of_a_policy_is_one(policy):
    kinds = {type(module) for module in policy.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {Linear}
