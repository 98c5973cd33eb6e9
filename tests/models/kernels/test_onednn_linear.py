"""Products by oneDNN have torch's values and gradients; only float32 on a CPU uses them."""

import pytest
import torch
from torch import nn

from segrl.models.kernels import onednn_linear
from segrl.models.kernels.onednn_linear import Linear, Patches, add_columns_by_columns, rows_by_rows
from segrl.rollout.shared_prefix import SharedPrefixEngine


@pytest.fixture
def calls(monkeypatch):
    """Count calls as on a CPU where oneDNN is faster, whatever this CPU is."""
    monkeypatch.setattr(onednn_linear, "FASTER", onednn_linear.HAS_ONEDNN)
    seen, made = [], onednn_linear._by_onednn
    monkeypatch.setattr(onednn_linear, "_by_onednn", lambda *given: seen.append(made(*given)) or seen[-1])
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


def test_half_precision_and_other_types_are_computed_by_torch(calls):
    layer = Linear(nn.Linear(8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
    assert Linear(nn.Linear(8, 4, dtype=torch.float64))(torch.randn(3, 8).double()).dtype == torch.float64
    assert calls and not any(calls)


@pytest.mark.parametrize("faster", [True, False])
def test_views_are_read_as_they_are(faster, monkeypatch):
    monkeypatch.setattr(onednn_linear, "FASTER", faster and onednn_linear.HAS_ONEDNN)
    one, other, total = torch.randn(30, 7), torch.randn(30, 11), torch.randn(7, 11)
    torch.testing.assert_close(rows_by_rows(one.t(), other.t()), one.t() @ other, rtol=1e-5, atol=1e-5)
    expected = total + one.t() @ other
    add_columns_by_columns(total, one, other)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_every_linear_layer_of_a_policy_is_one(policy):
    kinds = {type(module) for module in policy.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {Linear}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_over_patches_is_one_product(dtype, bias, calls):
    torch.manual_seed(0)
    theirs = nn.Conv3d(3, 20, (2, 4, 4), (2, 4, 4), bias=bias).to(dtype)
    ours = Patches(theirs)
    assert isinstance(ours, nn.Conv3d) and ours.weight is theirs.weight
    outcomes = []
    for layer in (theirs, ours):
        layer.zero_grad()
        given = (
            torch.randn(9, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        )
        out = layer(given)
        (out.float() * torch.linspace(-1, 1, 20).view(20, 1, 1, 1)).sum().backward()
        outcomes.append([out.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())])
    close = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip(*outcomes, strict=True):
        assert one.shape == other.shape
        assert (one - other).float().norm() <= close * one.float().norm()
    assert any(calls) == (dtype == torch.float32)


def test_the_patch_embedding_of_a_policy_is_one_and_others_stay(policy):
    kinds = {type(module) for module in policy.model.modules() if isinstance(module, nn.Conv3d)}
    assert kinds == {Patches}
    overlapping = nn.Sequential(nn.Conv3d(3, 4, (2, 4, 4), (2, 2, 2)))
    onednn_linear.take_products(overlapping)
    assert type(overlapping[0]) is nn.Conv3d


def test_without_onednns_operations_products_are_torchs(policy, prefixes, monkeypatch):
    """The operations are not in torch's public interface: another release may have them elsewhere."""
    engine = SharedPrefixEngine(12)
    expected = engine.greedy(policy, prefixes)
    monkeypatch.setattr(onednn_linear, "HAS_ONEDNN", False)
    monkeypatch.setattr(onednn_linear, "FASTER", False)
    assert not onednn_linear._has_ops("_linear_pointwise", "no_such_operation")
    found = engine.greedy(policy, prefixes)
    assert torch.equal(found.tokens, expected.tokens)
    layer = Linear(nn.Linear(8, 4))
    given = torch.randn(3, 8)
    assert torch.equal(layer(given), nn.functional.linear(given, layer.weight, layer.bias))
