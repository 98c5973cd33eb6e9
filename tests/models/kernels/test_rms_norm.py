"""Norms in front of products have transformers' values and gradients, also under autocast."""

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from segrl.models.kernels.rms_norm import Norm


def test_norms_are_replaced_in_front_of_every_product_and_nowhere_else(policy):
    trunk, tower = policy.model.model.language_model, policy.model.model.visual
    for layer in trunk.layers:
        assert isinstance(layer.input_layernorm, Norm) and isinstance(layer.post_attention_layernorm, Norm)
    of_tower = [isinstance(norm, Norm) for block in tower.blocks for norm in (block.norm1, block.norm2)]
    assert of_tower == [policy.model.config.model_type == "qwen2_5_vl"] * 2 * len(tower.blocks)
    assert not isinstance(trunk.norm, Norm)  # logits are made of it
    count = sum(isinstance(module, Norm) for module in policy.modules())
    assert count == 2 * len(trunk.layers) + sum(of_tower)
    assert not [name for name in policy.state_dict() if name.endswith("variance_epsilon")]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
def test_values_and_gradients_are_transformers_own(kind, half):
    theirs = Qwen2_5_VLRMSNorm(48).to(kind)
    theirs.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    ours = Norm(theirs)
    given = 3 * torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for norm in (theirs, ours):
        hidden = given.to(kind).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            out = norm(hidden)
            seen = out.to(torch.bfloat16) if half else out  # as a product casts it
        norm.zero_grad()
        (seen.float() * torch.linspace(-1, 1, 48)).sum().backward()
        outcomes.append((seen.detach(), hidden.grad, norm.weight.grad))
    assert out.dtype == (torch.bfloat16 if half else kind)
    close = (
        {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 and not half else {"rtol": 0.02, "atol": 0.05}
    )
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, **close)
