"""Layers of transformers are called with the keywords of the installed release; prefixes are padded right."""

import pytest
import torch
from torch import nn

from segrl.models.kernels import prefix_pass
from segrl.models.kernels.prefix_pass import _through, memory_keyword, pad_right
from segrl.types import Completions


class Until523(nn.Module):
    """A layer of transformers 5.23 and before, reduced to its use of the cache."""

    def forward(self, hidden, attention_mask, position_embeddings, past_key_values=None, **_):
        keys, values = past_key_values.update(hidden, 2 * hidden, 0)
        return keys.sum(2) + values.sum(2)


class Since524(nn.Module):
    """The same of transformers 5.24: another keyword, and the settings of the call are handed on."""

    def forward(self, hidden, attention_mask, position_embeddings, cache=None, **kwargs):
        keys, values = cache.update(hidden, 2 * hidden, 0, kwargs=kwargs)
        return keys.sum(2) + values.sum(2)


@pytest.mark.parametrize(("layer", "word"), [(Until523, "past_key_values"), (Since524, "cache")])
def test_a_layer_is_given_its_cache_by_the_keyword_that_it_has(layer, word):
    assert memory_keyword(layer) == word
    hidden = torch.full((1, 1, 2, 3), 1.0)
    out, keys, values = _through(layer(), hidden, (hidden, hidden))
    assert torch.equal(keys, hidden) and torch.equal(values, 2 * hidden)
    assert torch.equal(out, torch.full((1, 1, 3), 6.0))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.filterwarnings("error:.*is deprecated:FutureWarning")
def test_the_installed_layers_give_no_deprecation_warning(nano_policy, family):
    language = nano_policy(family).model.model.language_model
    hidden = torch.zeros(1, 2, language.config.hidden_size)
    rope = language.rotary_emb(hidden, torch.arange(2).expand(3, 1, -1))
    out, keys, _ = _through(language.layers[0], hidden, rope)
    assert out.shape == hidden.shape and keys.shape[2] == 2


def test_padding_is_on_the_right_up_to_a_multiple():
    padded, real = pad_right([torch.tensor([5, 6, 7]), torch.tensor([8])], 9, 4)
    assert padded.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert real.tolist() == [[True, True, True, False], [True, False, False, False]]
    rows, _ = pad_right([torch.ones(2, 3), torch.ones(1, 3)], 0)
    assert rows.shape == (2, 2, 3) and rows[1, 1].tolist() == [0, 0, 0]


def test_padding_up_to_a_multiple_changes_nothing(policy, prefixes, monkeypatch):
    """As on a GPU in half precision, the rows of all prefixes have padding; nothing attends to it."""
    tokens = torch.randint(0, 60, (6, 7), generator=torch.Generator().manual_seed(0))
    said = Completions(tokens=tokens, mask=tokens >= 0, texts=[""] * 6, finished=tokens[:, 0] >= 0)
    outcomes = []
    longest = policy.prefill(prefixes).attention_mask.shape[1]
    much = next(multiple for multiple in (32, 48) if longest % multiple)
    for multiple in (1, much):
        policy.zero_grad()
        with monkeypatch.context() as patched:
            patched.setattr(prefix_pass, "padded_to", lambda *_, multiple=multiple: multiple)
            state = policy.prefill(prefixes)
            logprobs = policy.logprobs(prefixes, said, state)
        (logprobs * torch.linspace(-1, 1, 42).view_as(logprobs)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        outcomes.append((state.attention_mask.shape[1], logprobs.detach(), gradients))
    (short, plain, expected), (long, padded, found) = outcomes
    assert long % much == 0 and short < long and (padded - plain).abs().max() < 1e-5
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name
