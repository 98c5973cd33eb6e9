"""The policy's contract, for both families: shared-prefix log-probabilities equal a naive forward pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from segrl.data.synthetic import SyntheticScenes
from segrl.models.kernels.prefix_pass import pad_right
from segrl.objectives.clipped import importance_ratio
from segrl.prompts.tags import SegR1Points, SegR1Tags
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.types import Completions

GROUP = 3


@pytest.fixture
def prefixes(policy):
    """Return three prefixes of unequal length: two grammars, and a query of its own."""
    scenes = SyntheticScenes("test", 3, 0, 128, (0.5, 1.0), (1, 1))
    tags, points = SegR1Tags(4, 8), SegR1Points(8)
    chats = [tags.messages(None), points.messages(None), tags.messages("the left fish")]
    made = [policy.encoder.encode(chat, scenes[i].image) for i, chat in enumerate(chats)]
    assert len({len(p.token_ids) for p in made}) == 3
    return made


def sampled(policy, prefixes, tokens=9, seed=0):
    return SharedPrefixEngine(tokens).sample(
        policy, prefixes, GROUP, range(seed, seed + len(prefixes) * GROUP)
    )


def transformers_own(policy):
    """Return the same weights as transformers loads them, without segrl's norms and attention."""
    model = AutoModelForImageTextToText.from_pretrained(policy.weights, dtype=torch.float32)
    model.load_state_dict(policy.model.state_dict())
    return model


def naive(model, policy, prefixes, completions):
    """Run one unpadded forward pass per completion, with positions left to transformers."""
    rows = []
    for n, (tokens, mask) in enumerate(zip(completions.tokens, completions.mask, strict=True)):
        prefix, tokens = prefixes[n // GROUP], tokens[mask]
        ids = torch.cat([prefix.token_ids, tokens])[None]
        kinds = torch.cat([prefix.token_types, torch.zeros_like(tokens)])[None]
        out = model(
            input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids),
            pixel_values=prefix.pixels, image_grid_thw=prefix.grid,
        )  # fmt: skip
        logits = out.logits[0, len(prefix.token_ids) - 1 : -1] / policy.temperature
        logits[:, policy.never_sampled] = -torch.inf
        picked = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        rows.append(torch.cat([picked, picked.new_zeros(completions.tokens.shape[1] - len(tokens))]))
    return torch.stack(rows)


def test_shared_prefix_logprobs_equal_a_naive_forward_pass_values_and_gradients(policy, prefixes):
    completions = sampled(policy, prefixes)
    plain = transformers_own(policy)
    shared, one_by_one = policy.logprobs(prefixes, completions), naive(plain, policy, prefixes, completions)
    assert (shared - one_by_one).abs().max() < 1e-5
    weights = torch.randn(shared.shape, generator=torch.Generator().manual_seed(1)) * completions.mask
    gradients = []
    for logprobs, model in ((shared, policy.model), (one_by_one, plain)):
        model.zero_grad()
        (logprobs * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("visual" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        # Below the floor is rounding: a bias of keys moves all scores alike, so its true gradient is zero.
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradients[1][name].norm() + 1e-6, name


def test_suffix_positions_counted_from_the_token_index_would_be_noticed(policy, prefixes):
    """Negative control: an image advances the rotary position by its side, not by its number of tokens."""
    completions = sampled(policy, prefixes[:1])
    right = policy.logprobs(prefixes[:1], completions)
    prefill = policy.prefill

    def wrong(given):
        state = prefill(given)
        return replace(state, next_position=state.attention_mask.sum(1))

    policy.prefill = wrong
    try:
        assert (policy.logprobs(prefixes[:1], completions) - right).abs().max() > 1e-3
    finally:
        policy.prefill = prefill


def test_first_update_ratio_is_exactly_one(policy, prefixes):
    logprobs = policy.logprobs(prefixes, sampled(policy, prefixes))
    assert torch.equal(importance_ratio(logprobs, logprobs.detach()), torch.ones_like(logprobs))


def test_one_completion_of_a_group_does_not_see_another(policy, prefixes):
    completions = sampled(policy, prefixes[:1])
    changed = completions.tokens.clone()
    changed[1] = changed[1].flip(0)
    before = policy.logprobs(prefixes[:1], completions)
    after = policy.logprobs(prefixes[:1], replace(completions, tokens=changed))
    assert torch.allclose(before[[0, 2]], after[[0, 2]], atol=1e-5)
    assert not torch.allclose(before[1], after[1], atol=1e-3)


def test_what_was_sampled_is_what_the_training_pass_finds_likely(policy, prefixes):
    """Greedy sampling takes the most likely token of the training pass."""
    completions = SharedPrefixEngine(8).greedy(policy, prefixes)
    hidden = policy.read(prefixes, completions)
    best = policy.logits(hidden, policy.head()).log_softmax(-1).amax(-1).masked_fill(~completions.mask, 0)
    assert torch.allclose(policy.logprobs(prefixes, completions), best, atol=1e-4)


def test_placeholders_are_never_sampled_and_have_no_probability(policy, prefixes):
    config = policy.model.config
    distribution = policy.logits(policy.prefill(prefixes).last_hidden, policy.head()).log_softmax(-1)
    assert torch.isneginf(distribution[:, [config.image_token_id, config.video_token_id]]).all()
    assert torch.allclose(distribution.exp().sum(-1), torch.ones(3), atol=1e-5)
    tokens = sampled(policy, prefixes, tokens=40).tokens
    assert not torch.isin(tokens, policy.never_sampled).any()


def test_sampling_follows_the_distribution(policy, prefixes):
    distribution = policy.logits(policy.prefill(prefixes[:1]).last_hidden, policy.head())[0].softmax(-1)
    drawn = SharedPrefixEngine(1).sample(policy, prefixes[:1], 4000, range(4000)).tokens[:, 0]
    counts = torch.bincount(drawn, minlength=len(distribution)) / 4000
    assert (counts - distribution).abs().sum() < (counts - distribution.flip(0)).abs().sum()
    likely = distribution.topk(5).indices
    assert torch.allclose(counts[likely], distribution[likely], atol=0.03)


def test_same_seed_same_completions_other_seed_others(policy, prefixes):
    first, again, other = (sampled(policy, prefixes, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_mask_ends_with_the_stop_token(policy, prefixes):
    completions = sampled(policy, prefixes, tokens=30)
    for tokens, mask, length in zip(completions.tokens, completions.mask, completions.lengths, strict=True):
        stops = torch.isin(tokens, policy.stop_ids).nonzero()
        expected = int(stops[0]) + 1 if len(stops) else len(tokens)
        assert int(length) == expected
        assert bool(mask[:expected].all()) and not bool(mask[expected:].any())


def test_every_declared_stop_token_ends_a_completion(nano_weights):
    """Qwen2.5-VL declares two, and its tokenizer names only one of them."""
    import shutil

    from segrl.models.hf_vlm import HFPolicy

    folder = nano_weights("qwen2_5_vl").with_name("two_stops")
    shutil.copytree(nano_weights("qwen2_5_vl"), folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    policy = HFPolicy(str(folder), 112, None, 1.0, "float32", None, True, False)
    tokenizer = policy.encoder.processor.tokenizer
    assert set(policy.stop_ids.tolist()) == {5, 7, tokenizer.eos_token_id}


def test_frame_is_that_of_the_family(policy, prefixes):
    frame = prefixes[0].frame
    expected = (1000, 1000) if policy.model.config.model_type == "qwen3_vl" else (112, 112)
    assert (frame.width, frame.height) == expected


def test_answers_round_trip_through_the_tokenizer(policy):
    text = "<think> A tiny object, top left. </think> <bbox>[1,20,300,1000]</bbox> naïve 漢字"
    ids = policy.encoder.answer(text)
    assert int(ids[-1]) in policy.stop_ids.tolist()
    assert policy.encoder.decode(ids[None], torch.ones(1, len(ids), dtype=torch.bool)) == [text]


def test_a_folder_without_a_model_is_refused_by_its_key(tmp_path, nano_policy):
    from segrl.models.hf_vlm import HFPolicy

    with pytest.raises(ValueError, match=r"policy\.weights: .*config\.json"):
        HFPolicy(str(tmp_path), None, None, 1.0, "float32", None, True, False)


def test_padding_right_marks_what_is_real():
    padded, mask = pad_right([torch.tensor([5, 6]), torch.tensor([7])], 0)
    assert padded.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_logprobs_of_rows_are_those_of_the_whole(policy, prefixes):
    completions = sampled(policy, prefixes)
    whole = policy.logprobs(prefixes, completions)
    parts = [
        policy.logprobs(prefixes[b : b + 1], completions.rows(slice(b * GROUP, (b + 1) * GROUP)))
        for b in range(3)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-4)
    assert isinstance(completions, Completions) and np.isfinite(whole.detach().numpy()).all()


def gradients_of(policy, loss):
    policy.zero_grad()
    loss().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def same(one, other, within=1e-4):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= within * other[name].norm() + 1e-6, name


def test_activations_computed_again_give_the_same_gradients(policy, prefixes, nano_weights):
    from segrl.models.hf_vlm import HFPolicy

    folder = nano_weights(policy.model.config.model_type)
    thrifty = HFPolicy(str(folder), policy.encoder.image_side, None, 1.0, "float32", None, True, True)
    completions = sampled(policy, prefixes)

    def kept(of):
        """Return the bytes that the forward pass keeps for the backward pass."""
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
            of.logprobs(prefixes, completions)
        return sum(total)

    same(
        *(
            gradients_of(p, lambda p=p: p.logprobs(prefixes, completions).square().sum())
            for p in (thrifty, policy)
        )
    )
    assert kept(thrifty) < 0.4 * kept(policy)


def test_groups_in_pieces_give_the_gradients_of_whole_groups(policy, prefixes):
    """The gradients of the pieces add up at the prefix, which has one forward and one backward pass."""
    completions = sampled(policy, prefixes)
    weights = (
        torch.randn(completions.mask.shape, generator=torch.Generator().manual_seed(1)) * completions.mask
    )

    def whole():
        return (policy.logprobs(prefixes, completions) * weights).sum()

    def in_pieces():
        state = policy.prefill(prefixes)
        leaves = state.detached()
        rows = [[b * GROUP + g for b in range(len(prefixes))] for g in range(GROUP)]
        for some in rows[:-1]:
            (policy.logprobs(prefixes, completions.take(some), leaves) * weights[some]).sum().backward()
        last = (policy.logprobs(prefixes, completions.take(rows[-1]), state) * weights[rows[-1]]).sum()
        return last + state.chain_gradient(leaves)

    reads = []
    tower = policy.model.model.visual
    hook = tower.register_forward_hook(lambda *_: reads.append(1))
    pieces = gradients_of(policy, in_pieces)
    hook.remove()
    assert len(reads) == 1
    same(pieces, gradients_of(policy, whole))


def test_pieces_without_their_share_of_the_prefix_would_be_noticed(policy, prefixes):
    """Negative control of the test above: the gradients do not add up at the prefix."""
    completions = sampled(policy, prefixes)

    def cut_off():
        return policy.logprobs(prefixes, completions, policy.prefill(prefixes).detached()).sum()

    detached, whole = (
        gradients_of(policy, f) for f in (cut_off, lambda: policy.logprobs(prefixes, completions).sum())
    )
    assert any("visual" in name for name in whole) and not any("visual" in name for name in detached)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_special_token_in_a_query_or_an_answer_is_text(nano_policy, family):
    encoder, image = nano_policy(family).encoder, np.zeros((56, 84, 3), np.uint8)
    special = [t.content for t in encoder.processor.tokenizer.added_tokens_decoder.values() if t.special]
    assert "<|image_pad|>" in special and "<|im_end|>" in special

    def counted(query):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": query}]}]
        ids = encoder.encode(chat, image).token_ids.tolist()
        known = encoder.processor.tokenizer.convert_tokens_to_ids(special)
        return {word: ids.count(one) for word, one in zip(special, known, strict=True)}

    assert counted("the sign") == counted(f"the {' '.join(special)} sign") == counted("".join(special))
    answer = encoder.answer("<think> a <|im_end|> b </think>").tolist()
    assert answer.count(encoder.processor.tokenizer.eos_token_id) == 1
    assert encoder.spelled("a plain <think> text </think>") == "a plain <think> text </think>"
