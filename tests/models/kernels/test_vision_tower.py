"""Positions of patches and tokens, computed on the host, are those of transformers on the device."""

import pytest
import torch

from segrl.models.kernels.vision_tower import image_features, rotary_positions, tower_layout
from segrl.types import Frame, Prefix

SIDES = [(8, 12), (10, 4), (2, 2)]


def a_prefix(policy, height, width, before=5, behind=4, seed=0):
    """Return text, an image of so many patches, and text."""
    config, eyes = policy.model.config, policy.encoder.processor.image_processor
    count = height * width // eyes.merge_size**2
    ids = torch.tensor([7] * before + [config.image_token_id] * count + [8] * behind)
    types = (ids == config.image_token_id).long()
    grid = torch.tensor([[1, height, width]])
    wide = 3 * eyes.temporal_patch_size * eyes.patch_size**2
    noise = torch.Generator().manual_seed(seed)
    return Prefix(
        token_ids=ids, token_types=types, pixels=torch.randn(height * width, wide, generator=noise),
        positions=rotary_positions(types, grid, eyes.merge_size), grid=grid, frame=Frame(1, 1),
    )  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("before", [0, 5])
def test_rotary_positions_are_those_of_transformers(policy, side, before):
    prefix = a_prefix(policy, *side, before=before)
    expected, _ = policy.model.model.get_rope_index(
        prefix.token_ids[None], mm_token_type_ids=prefix.token_types[None], image_grid_thw=prefix.grid
    )
    assert torch.equal(prefix.positions, expected[:, 0])


def test_features_are_those_that_transformers_makes_alone(policy):
    """Images are of unequal size. A layout left in the tower's arguments would be refused by its layers."""
    prefixes = [a_prefix(policy, *side, seed=i) for i, side in enumerate(SIDES)]
    pixels, grid = (torch.cat([getattr(p, name) for p in prefixes]) for name in ("pixels", "grid"))
    with torch.no_grad():
        expected = policy.model.model.get_image_features(pixels, grid, return_dict=True)
        found = image_features(policy.model.model, prefixes)
    assert len(found.pooler_output) == len(SIDES)
    for one, other in zip(found.pooler_output, expected.pooler_output, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        found.get("deepstack_features") or (), expected.get("deepstack_features") or (), strict=True
    ):
        assert all(map(torch.equal, one, other))


def test_the_tower_asks_for_nothing_more_than_its_layout(policy, monkeypatch):
    """On a GPU, each number read from a grid would make the host wait."""
    tower, read = policy.model.model.visual, []
    layout = tower_layout(tower, torch.tensor([[1, *side] for side in SIDES]), torch.device("cpu"))
    prefixes = [a_prefix(policy, *side) for side in SIDES]
    pixels = torch.cat([p.pixels for p in prefixes])
    for name in ("tolist", "item", "__int__", "__bool__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, plain=plain, name=name: read.append(name) or plain(self)
        )
    monkeypatch.setattr(
        "segrl.models.kernels.window_attention._by_size", lambda q, *_: q
    )  # the way of a CPU looks
    with torch.no_grad():
        tower(pixels, grid_thw=torch.tensor([[1, *side] for side in SIDES]), **layout)
    assert read == []
