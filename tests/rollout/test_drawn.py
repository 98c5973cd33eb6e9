"""A token is drawn where the cumulative distribution passes the noise, for any number of blocks."""

import pytest
import torch

from segrl.rollout.shared_prefix import sample_tokens

MOST = 1 - 2**-24  # what a float32 generator can give


def at_once(probabilities, noise):
    cumulative = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 1000, 4096])
def test_drawing_by_blocks_draws_what_the_whole_distribution_draws(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = (3 * torch.randn(400, vocabulary, generator=generator)).softmax(-1)
    noise = torch.rand(400, generator=generator).double()
    assert torch.equal(sample_tokens(probabilities, noise), at_once(probabilities, noise))


def test_frequencies_are_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(300, generator=generator)).softmax(-1)
    noise = (torch.arange(100_000) / 100_000).double()
    counts = torch.bincount(sample_tokens(probabilities.expand(len(noise), -1), noise), minlength=300)
    assert (counts / len(noise) - probabilities).abs().max() < 2e-5  # no token is off by more than two


@pytest.mark.parametrize("noise", [0.0, MOST])
@pytest.mark.parametrize("only", [0, 127, 128, 200, 299])
def test_the_only_token_with_probability_is_drawn_at_either_end_of_the_noise(noise, only):
    probabilities = torch.zeros(1, 300)
    probabilities[0, only] = 1e-30
    assert sample_tokens(probabilities, torch.tensor([noise], dtype=torch.float64)).item() == only


def test_noise_on_the_edge_of_a_token_never_draws_one_without_probability():
    """The noise falls on the edges between tokens, most of which have no probability."""
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(1, 700, generator=generator) ** 40
    probabilities[:, torch.rand(700, generator=generator) < 0.9] = 0
    probabilities /= probabilities.sum()
    edges = probabilities.double().cumsum(-1)[0]
    noise = torch.cat([(edges + away).clamp(0, MOST) for away in (0.0, 2**-53, -(2**-53), 1e-17, -1e-17)])
    assert (probabilities[0, sample_tokens(probabilities.expand(len(noise), -1), noise)] > 0).all()
