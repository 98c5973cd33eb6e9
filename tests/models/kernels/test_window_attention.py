"""A vision tower's windows in few calls have the values and gradients of one call per window."""

import pytest
import torch

from segrl.models.kernels import window_attention
from segrl.models.kernels.vision_tower import image_features

SIDES = [(8, 12), (10, 4), (2, 2)]  # patches of three images; windows are cut where they end


def plain_kernel(query, key, value, ends, key_ends, longest, most_keys, scale):
    """Compute what torch documents of its kernel: one attention per segment."""
    assert ends is key_ends and longest == most_keys == ends.diff().max() and ends.dtype == torch.int32
    parts = zip(*(part.tensor_split(ends[1:-1].tolist()) for part in (query, key, value)), strict=True)
    said = []
    for q, k, v in ([part.transpose(0, 1) for part in qkv] for qkv in parts):
        weights = (scale * q.float() @ k.float().transpose(1, 2)).softmax(-1)
        said.append((weights @ v.float()).to(q.dtype))
    return torch.cat([part.transpose(0, 1) for part in said])


def serving(monkeypatch, where):
    monkeypatch.setattr(window_attention, "kernel_serves", where)


def seen(policy, attention):
    """Return the tower's features of three images, and the gradients of a sum of them."""
    tower, config = policy.model.model.visual, policy.model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    count = sum(height * width for height, width in SIDES)
    wide = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(count, wide, generator=generator)
    assert tower.config._attn_implementation == window_attention.NAME
    tower.config._attn_implementation = attention
    tower.zero_grad()
    try:
        out = tower(pixels, torch.tensor([[1, *side] for side in SIDES])).pooler_output
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    finally:
        tower.config._attn_implementation = window_attention.NAME
    return out.detach(), {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", [False, True])
def test_windows_in_few_calls_are_windows_one_by_one(policy, monkeypatch, kernel):
    calls = []

    def counted(*given, **settings):
        calls.append(1)
        return plain_kernel(*given, **settings)

    monkeypatch.setattr(window_attention, "varlen_attn", counted)
    serving(monkeypatch, lambda *_: kernel)
    expected, of_expected = seen(policy, "sdpa")
    found, of_found = seen(policy, window_attention.NAME)
    assert len(calls) == kernel * len(policy.model.model.visual.blocks)
    assert (found - expected).abs().max() < 1e-5
    assert of_found.keys() == of_expected.keys() and len(of_found) > 20
    for name, gradient in of_found.items():
        assert (gradient - of_expected[name]).norm() <= 1e-4 * of_expected[name].norm() + 1e-6, name


def test_a_patch_that_saw_another_window_would_be_noticed(policy, monkeypatch):
    """Negative control: every patch attends to all."""

    def everything(query, key, value, ends, key_ends, longest, most_keys, scale):
        whole = torch.tensor([0, len(query)], dtype=torch.int32)
        return plain_kernel(query, key, value, whole, whole, len(query), len(query), scale)

    serving(monkeypatch, lambda *_: True)
    monkeypatch.setattr(window_attention, "varlen_attn", everything)
    assert (seen(policy, window_attention.NAME)[0] - seen(policy, "sdpa")[0]).abs().max() > 1e-3


def test_in_half_precision_the_kernel_gets_half_precision(policy, monkeypatch):
    kinds = []

    def kernel(query, key, value, *given, **settings):
        kinds.extend((query.dtype, key.dtype, value.dtype))
        return plain_kernel(query, key, value, *given, **settings)

    expected, _ = seen(policy, "sdpa")
    serving(monkeypatch, lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(window_attention, "varlen_attn", kernel)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        half, _ = seen(policy, window_attention.NAME)
    assert kinds and set(kinds) == {torch.bfloat16}
    assert torch.cosine_similarity(half.float().flatten(), expected.flatten(), 0) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 72, 80])
def test_the_kernel_gives_the_values_of_windows_one_by_one(gpu, width):
    """Values and gradients are compared on parts of one projection, as in the tower."""
    ends = torch.tensor([0, 64, 128, 160, 176], dtype=torch.int32, device=gpu)
    qkv = torch.randn(176, 3, 4, width, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    by_size = window_attention._by_size(*qkv.unbind(1), ends, width**-0.5)
    if gpu.type == "cuda":
        by_kernel = window_attention._by_kernel(*qkv.unbind(1), ends, 64, width**-0.5)
    else:
        by_kernel = plain_kernel(*qkv.unbind(1), ends, ends, 64, 64, width**-0.5)
    outcomes = [
        (out, torch.autograd.grad(out.float().square().sum(), qkv)[0]) for out in (by_kernel, by_size)
    ]
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("believed", [True, False])
def test_the_kernel_is_used_once_it_has_repeated_calls_by_size(believed, monkeypatch, recwarn):
    def kernel(*given, **settings):
        return plain_kernel(*given, **settings) * (1.0 if believed else 1.2)

    monkeypatch.setattr(window_attention, "varlen_attn", kernel)
    window_attention._kernel_repeats.cache_clear()
    with torch.inference_mode():
        found = window_attention._kernel_repeats(torch.device("cpu"), torch.float32)
    window_attention._kernel_repeats.cache_clear()
    assert found is believed and len(recwarn) == (not believed)


def test_windows_are_worked_out_once_per_pass(policy, monkeypatch):
    made, plain = [], window_attention._Windows
    monkeypatch.setattr(window_attention, "_Windows", lambda ends: made.append(1) or plain(ends))
    seen(policy, window_attention.NAME)
    config = policy.model.config.vision_config
    assert len(made) == (2 if "window_size" in config.to_dict() else 1) < config.depth
    seen(policy, window_attention.NAME)  # other tensors, though equal ones
    assert len(made) == 2 * (2 if "window_size" in config.to_dict() else 1)


def test_a_first_use_in_a_pass_that_recomputes_spoils_no_gradient(policy, prefixes, monkeypatch):
    """The kernel is compared with calls by size before the tower runs: a checkpointed block would keep the
    tensors of that comparison, too.
    """
    monkeypatch.setattr(window_attention, "varlen_attn", plain_kernel)
    monkeypatch.setattr(window_attention, "has_kernel", lambda *_: True)
    tower, gradients = policy.model.model.visual, []
    for recompute in (False, True):
        if recompute:
            tower.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        policy.zero_grad()
        window_attention._kernel_repeats.cache_clear()
        try:
            features = torch.cat(image_features(policy.model.model, prefixes).pooler_output)
            features.square().sum().backward()
        finally:
            tower.gradient_checkpointing_disable()
            window_attention._kernel_repeats.cache_clear()
        gradients.append(torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
