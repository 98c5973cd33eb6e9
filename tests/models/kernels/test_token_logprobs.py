"""The head in chunks has the values and gradients of a plain log-softmax."""

import pytest
import torch

from segrl.models.kernels import token_logprobs as module
from segrl.models.kernels.token_logprobs import float32_products, token_logprobs

NEVER = torch.tensor([3, 7])


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10, 19, 0])
    return hidden.requires_grad_(), weight.requires_grad_(), tokens


def naive(hidden, weight, tokens):
    logits = hidden @ weight.t()
    logits[:, NEVER] = -torch.inf
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("most", [1, 20 * 4, 20 * 11, 2**26])
def test_equals_a_plain_log_softmax_values_and_gradients(most):
    outcomes = []
    for how in (naive, lambda *given: token_logprobs(*given, NEVER, most)):
        hidden, weight, tokens = inputs()
        out = how(hidden, weight, tokens)
        (out * torch.linspace(-1, 2, 11)).sum().backward()
        outcomes.append((out.detach(), hidden.grad, weight.grad))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, tokens = inputs()
    token_logprobs(hidden, weight.detach(), tokens, NEVER).sum().backward()
    assert weight.grad is None and hidden.grad is not None


def test_no_more_logits_exist_at_once_than_allowed(monkeypatch):
    seen = []
    plain = module._logits
    monkeypatch.setattr(module, "_logits", lambda *given: seen.append(plain(*given)) or seen[-1])
    hidden, weight, tokens = inputs()
    token_logprobs(hidden, weight, tokens, NEVER, 60).sum().backward()
    assert {len(logits) for logits in seen} == {3, 2} and len(seen) == 8  # four chunks, forward and backward


def test_what_is_computed_again_is_as_precise_as_it_was(monkeypatch):
    """The backward pass runs when the settings of the forward pass are gone."""
    seen, plain = [], module._logits
    monkeypatch.setattr(
        module, "_logits", lambda *given: seen.append(torch.get_float32_matmul_precision()) or plain(*given)
    )
    for rounded in (True, False):
        monkeypatch.setattr(module, "may_round", lambda device, rounded=rounded: rounded)
        token_logprobs(*inputs(), NEVER, most=20 * 6).sum().backward()
    assert seen == ["high"] * 4 + ["highest"] * 4
    assert torch.get_float32_matmul_precision() == "highest"


def test_where_nothing_is_rounded_torchs_setting_is_left_alone(monkeypatch):
    """It is read and written only on a GPU under autocast, so that setting it in torch's other way raises
    nothing.
    """

    def touched(*_):
        raise AssertionError("it is not to be touched")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", touched)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", touched)
    with torch.autocast("cpu", torch.bfloat16):
        token_logprobs(*inputs(), NEVER, most=20 * 6).sum().backward()
        with float32_products(torch.device("cpu"), False):
            assert not torch.is_autocast_enabled("cpu")
