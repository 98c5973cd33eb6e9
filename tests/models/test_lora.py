"""Adapters start at zero, hold all that learns, and can be turned off, merged, and used beside a critic."""

import copy

import pytest
import torch

from segrl.data.synthetic import SyntheticScenes
from segrl.models.hf_vlm import HFPolicy
from segrl.models.reference import AdapterOff, FrozenCopy
from segrl.models.value_head import AdapterCritic, DetachedCritic, SharedCritic
from segrl.prompts.tags import SegR1Tags
from segrl.rollout.shared_prefix import SharedPrefixEngine

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
FAMILIES = ("qwen3_vl", "qwen2_5_vl")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def policy_of(weights, family, lora=LORA, train_vision=False):
    return HFPolicy(
        str(weights(family)),
        {"qwen3_vl": 128, "qwen2_5_vl": 112}[family],
        None,
        1.0,
        "float32",
        lora,
        train_vision,
        False,
    )


def spoken(policy, count=2):
    scenes, grammar = SyntheticScenes("test", count, 0, 128, (0.5, 1.0), (1, 1)), SegR1Tags(4, 8)
    prefixes = [policy.encoder.encode(grammar.messages(None), scenes[i].image) for i in range(count)]
    return prefixes, SharedPrefixEngine(6).sample(policy, prefixes, 2, range(2 * count))


def disturb(policy):
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )


def test_an_adapter_starts_at_zero_and_is_all_that_learns(nano_weights, family):
    plain, policy = policy_of(nano_weights, family, None, True), policy_of(nano_weights, family)
    prefixes, said = spoken(policy)
    torch.testing.assert_close(
        policy.logprobs(prefixes, said), plain.logprobs(prefixes, said), rtol=0, atol=1e-6
    )
    learned = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert learned and all(".lora_" in name and "language_model" in name for name in learned)
    policy.logprobs(prefixes, said).sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_a_frozen_tower_learns_nothing_and_the_rest_does(nano_weights, family):
    policy = policy_of(nano_weights, family, None, False)
    learned = {".visual." in name for name, p in policy.named_parameters() if p.requires_grad}
    assert learned == {False}


def test_with_the_adapter_off_the_policy_is_its_reference(nano_weights, family):
    policy = policy_of(nano_weights, family)
    frozen, off = FrozenCopy(policy), AdapterOff(policy)
    disturb(policy)
    prefixes, said = spoken(policy)
    torch.testing.assert_close(off.logprobs(prefixes, said), frozen.logprobs(prefixes, said), rtol=0, atol=0)
    assert (policy.logprobs(prefixes, said) - off.logprobs(prefixes, said)).abs().max() > 1e-3
    assert all(p.requires_grad for name, p in policy.named_parameters() if ".lora_" in name)
    with pytest.raises(ValueError, match=r"policy\.lora"):
        AdapterOff(policy_of(nano_weights, family, None))


def test_a_merged_policy_gives_the_same_logprobs(nano_weights, family, tmp_path):
    policy = policy_of(nano_weights, family)
    disturb(policy)
    prefixes, said = spoken(policy)
    before = policy.logprobs(prefixes, said).detach()
    policy.save(tmp_path, 40)
    merged = HFPolicy(str(tmp_path), policy.encoder.image_side, None, 1.0, "float32", None, True, False)
    torch.testing.assert_close(merged.logprobs(prefixes, said), before, rtol=0, atol=1e-5)
    assert not [name for name in merged.state_dict() if "lora" in name]


def test_weights_are_taken_over_between_policies_with_and_without_an_adapter(nano_weights, family):
    plain, policy = policy_of(nano_weights, family, None), policy_of(nano_weights, family)
    moved = {name: value + 0.01 for name, value in plain.state_dict().items()}
    policy.load_policy(moved)  # all weights, under an adapter
    prefixes, said = spoken(policy)
    plain.load_state_dict(moved)
    torch.testing.assert_close(
        policy.logprobs(prefixes, said), plain.logprobs(prefixes, said), rtol=0, atol=1e-5
    )
    disturb(policy)
    adapter = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    other = policy_of(nano_weights, family)
    other.load_policy(adapter)  # an adapter alone
    assert all(torch.equal(dict(other.named_parameters())[name], value) for name, value in adapter.items())
    with pytest.raises(ValueError, match=r"policy\.lora"):
        plain.load_policy(adapter)
    with pytest.raises(ValueError, match="it has no"):
        policy_of(nano_weights, family, None, True).load_policy({})


@pytest.mark.parametrize("kind", [DetachedCritic, SharedCritic, AdapterCritic])
def test_critics_start_at_their_prior_and_move_the_policy_only_where_they_may(nano_weights, family, kind):
    policy = policy_of(nano_weights, family)
    plain = copy.deepcopy(policy)
    critic = kind(policy, 5, 0.25, **({"lora": LORA} if kind is AdapterCritic else {}))
    prefixes, said = spoken(policy)
    hidden, told = policy.read(prefixes, said), torch.rand(len(said.tokens), 5)
    values = critic(hidden, prefixes, said, told)
    assert values.shape == said.tokens.shape and (values == 0.25).all()
    torch.testing.assert_close(
        policy.logprobs(prefixes, said), plain.logprobs(prefixes, said), rtol=0, atol=1e-6
    )
    with torch.no_grad():
        critic.head.outer.weight += 0.1
    values = critic(policy.read(prefixes, said), prefixes, said, told)
    assert (values - critic(policy.read(prefixes, said), prefixes, said, told + 1)).abs().max() > 1e-4
    values.sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    mine = {".critic." in name for name in moved}
    assert mine == {DetachedCritic: set(), SharedCritic: {False}, AdapterCritic: {True}}[kind]
    if kind is AdapterCritic:
        with pytest.raises(ValueError, match=r"stage\.critic"):
            kind(policy_of(nano_weights, family, None), 0, 0.0, LORA)
        thrifty = policy_of(nano_weights, family)
        thrifty.gradient_checkpointing = True
        with pytest.raises(ValueError, match="gradient_checkpointing"):
            kind(thrifty, 0, 0.0, LORA)
