"""Completions packed into one row, for a kernel of unequal lengths, give the values of padded attention."""

import re

import pytest
import torch

from segrl.models.kernels import prefix_pass, suffix_attention
from segrl.models.kernels.suffix_attention import PaddedSuffixes, VarlenSuffixes
from segrl.types import Completions

GROUP, LENGTHS = 3, [5, 1, 7, 2, 7, 3]  # one has no token to be read: its only one is predicted by the prefix


def plain_varlen(
    query,
    key,
    value,
    query_ends,
    key_ends,
    most_queries,
    most_keys,
    scale,
    window_size,
    enable_gqa=True,
    causal_at="end",
):
    """Compute what torch documents of its kernel: one attention per segment, causal from the end."""
    assert window_size == (-1, 0) and enable_gqa and query.dtype == key.dtype == value.dtype
    assert most_queries == query_ends.diff().max() and most_keys == key_ends.diff().max()
    out = []
    for q, k, v in zip(
        *(
            part.tensor_split(ends[1:-1].tolist())
            for part, ends in ((query, query_ends), (key, key_ends), (value, key_ends))
        ),
        strict=True,
    ):
        rows, columns = torch.arange(len(q))[:, None], torch.arange(len(k))
        seen = columns <= rows + (len(k) - len(q) if causal_at == "end" else 0)
        shared = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(shared, 1).transpose(0, 1).float() for part in (k, v))
        weights = (scale * q.transpose(0, 1).float() @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        out.append((weights.softmax(-1) @ v).to(q.dtype).transpose(0, 1))
    return torch.cat(out)


def said():
    tokens = torch.randint(0, 60, (6, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return Completions(tokens=tokens, mask=mask, texts=[""] * 6, finished=mask.any(1))


def learned(policy, prefixes):
    """Return log-probabilities, and the gradients of a weighted sum of them."""
    policy.zero_grad()
    logprobs = policy.logprobs(prefixes, said())
    (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def in_segments(monkeypatch, kernel):
    monkeypatch.setattr(prefix_pass, "laid_out", VarlenSuffixes)
    monkeypatch.setattr(suffix_attention, "varlen_attn", kernel)


def test_segments_give_the_values_and_gradients_of_padded_attention(policy, prefixes, monkeypatch):
    padded, expected = learned(policy, prefixes)
    in_segments(monkeypatch, plain_varlen)
    logprobs, gradients = learned(policy, prefixes)
    assert (logprobs - padded).abs().max() < 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


def test_causality_aligned_at_the_start_would_be_noticed(policy, prefixes, monkeypatch):
    padded, _ = learned(policy, prefixes)
    in_segments(monkeypatch, lambda *given, **keys: plain_varlen(*given, **keys, causal_at="start"))
    assert (learned(policy, prefixes)[0] - padded).abs().max() > 1e-3


def test_in_half_precision_the_kernel_gets_half_precision(policy, prefixes, monkeypatch):
    seen = []

    def kernel(query, *given, **keys):
        seen.append(query.dtype)
        return plain_varlen(query, *given, **keys)

    full, expected = learned(policy, prefixes)
    in_segments(monkeypatch, kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # as Lightning does
        half, gradients = learned(policy, prefixes)
    assert set(seen) == {torch.bfloat16} and len(seen) == len(policy.model.model.language_model.layers)
    assert 0 < (half - full).abs().max() < 0.1
    for name, gradient in gradients.items():
        if expected[name].norm() > 1e-3:
            assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.95, name


def test_layers_compute_no_row_of_padding(policy, prefixes):
    """The language model's layers see rows of the tokens to be read, and no others."""
    rows = []
    state = policy.prefill(prefixes)
    mlp = policy.model.model.language_model.layers[0].mlp
    hook = mlp.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:-1].numel()))
    try:
        policy.logprobs(prefixes, said(), state)
    finally:
        hook.remove()
    assert rows == [sum(LENGTHS) - len(LENGTHS)]


def test_completions_of_one_token_are_predicted_by_their_prefix(policy, prefixes):
    short, long = said(), said()
    short = short.take([1, 1])
    wide = Completions(
        tokens=long.tokens[[1, 1]], mask=long.mask[[1, 1]], texts=["", ""], finished=long.finished[[1, 1]]
    )
    cut = Completions(
        tokens=short.tokens[:, :1], mask=short.mask[:, :1], texts=["", ""], finished=short.finished
    )
    assert torch.equal(policy.logprobs(prefixes, wide)[:, :1], policy.logprobs(prefixes, cut))


def test_unpacking_restores_what_was_packed():
    real = said().mask
    seen = torch.tensor([[False, True, True], [True, True, True]])
    lay = PaddedSuffixes(seen, real)
    values = torch.arange(42.0).view(6, 7, 1)
    packed = lay.pack(values)
    assert packed.flatten().tolist() == values[real].flatten().tolist()
    assert torch.equal(lay.unpack(packed), values * real[..., None])


def test_a_kernel_without_the_keyword_for_shared_keys_is_called_without_it(policy, prefixes, monkeypatch):
    """torch 2.11's kernel is one."""

    def older(query, key, value, query_ends, key_ends, most_queries, most_keys, *, scale, window_size):
        return plain_varlen(
            query, key, value, query_ends, key_ends, most_queries, most_keys, scale, window_size
        )

    assert suffix_attention.shares_keys(older) == {} and suffix_attention.shares_keys(plain_varlen) == {
        "enable_gqa": True
    }
    padded, _ = learned(policy, prefixes)
    in_segments(monkeypatch, older)
    monkeypatch.setattr(suffix_attention, "_SHARES_KEYS", suffix_attention.shares_keys(older))
    assert (learned(policy, prefixes)[0] - padded).abs().max() < 1e-5


@pytest.mark.gpu
def test_the_kernel_gives_the_values_of_padded_attention(gpu):
    """Values and gradients are compared at the head widths of Qwen's policies."""
    torch.manual_seed(0)
    seen = torch.ones(2, 40, dtype=torch.bool, device=gpu)
    seen[0, 33:] = False
    real = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).to(gpu)
    kernel = VarlenSuffixes(seen, real, torch.bfloat16) if gpu.type == "cuda" else PaddedSuffixes(seen, real)
    for width in (32, 64, 128):
        given = [
            torch.randn(shape, device=gpu, dtype=torch.bfloat16, requires_grad=True)
            for shape in (
                (1, 8, sum(LENGTHS), width),
                *[(1, 2, sum(LENGTHS), width)] * 2,
                *[(2, 2, 40, width)] * 2,
            )
        ]
        outs, gradients = [], []
        for layout in (PaddedSuffixes(seen, real), kernel):
            out = layout.attend(*given[:3], (given[3], given[4]), width**-0.5)
            gradients.append(torch.autograd.grad(out.float().square().sum(), given))
            outs.append(out)
        torch.testing.assert_close(*outs, rtol=0.02, atol=0.02)
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


class Wrong(PaddedSuffixes):
    """A kernel that gives wrong values."""

    def attend(self, *given):
        return 1.1 * super().attend(*given)


class WrongGradient(PaddedSuffixes):
    """A kernel whose backward pass gives wrong gradients."""

    def attend(self, *given):
        out = super().attend(*given)
        return out + (out - out.detach()) * float("nan")


class Raising(PaddedSuffixes):
    """A kernel that this machine cannot run."""

    def attend(self, *given):
        raise RuntimeError("no kernel image is available\nand so on")


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (PaddedSuffixes, None),
        (Wrong, "off by"),
        (WrongGradient, "off by .*nan"),
        (Raising, "no kernel image is available$"),
    ],
)
def test_a_kernel_is_used_once_it_has_repeated_padded_attention(kernel, said, inside, monkeypatch, recwarn):
    monkeypatch.setattr(suffix_attention, "VarlenSuffixes", lambda seen, real, dtype: kernel(seen, real))
    suffix_attention._kernel_repeats.cache_clear()
    before = torch.get_rng_state()
    with inside(), torch.autocast("cpu", torch.bfloat16):
        believed = [suffix_attention._kernel_repeats(torch.device("cpu"), torch.bfloat16) for _ in range(2)]
    suffix_attention._kernel_repeats.cache_clear()
    assert believed == [said is None] * 2 and torch.equal(torch.get_rng_state(), before)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (said is not None)
    assert said is None or re.search(f"padded.*{said}", messages[0])
