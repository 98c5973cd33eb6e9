"""Dense rewards sum to zero, are paid at the token that closes, and do not change the terminal reward."""

from functools import partial

import numpy as np
import pytest
import torch

from segrl.data.synthetic import SyntheticScenes
from segrl.geometry import inner_point, tight_box
from segrl.metrics.functional.overlap import iou
from segrl.prompts.answer_json import SamR1Json
from segrl.prompts.tags import SegR1Tags
from segrl.rewards.mask import tiered_potential
from segrl.rollout.shaping import PromptShaping
from segrl.segmenter import Segmenter
from segrl.types import Batch, Completions, MaskPrompt, Parsed

SCENES = SyntheticScenes("test", 3, 0, 128, (0.5, 1.0), (2, 2))
POTENTIALS = [iou, partial(tiered_potential, tiers={0.8: 1.0, 0.7: 0.75, 0.5: 0.5})]


class Echo:
    """Returns what it is given."""

    def __init__(self, texts):
        self.texts = texts


@pytest.fixture(params=[SegR1Tags(4, 8), SamR1Json(8)], ids=["tags", "json"])
def spoken(request, nano_policy, nano_head):
    """Return completions of two samples: right, half right, points outside only, a fault, and one cut off."""
    grammar, policy = request.param, nano_policy("qwen3_vl")
    samples = [SCENES[0], SCENES[1]]
    prefixes = [policy.encoder.encode(grammar.messages(None), s.image) for s in samples]
    texts = []
    for sample, prefix in zip(samples, prefixes, strict=True):
        box, point = tight_box(sample.objects[0]), inner_point(sample.objects[0])
        for prompt in (
            MaskPrompt.of([box], [point, point], [1, 1]),
            MaskPrompt.of([np.clip(box + 0.1, 0, 1)], [point, [0.99, 0.99], [0.01, 0.99]], [1, 0, 0]),
            MaskPrompt.of([[0, 0, 1, 1]], [[0.5, 0.5]], [0]),
        ):
            texts.append(grammar.render(Parsed(thought="here", prompt=prompt), prefix.frame))
        texts += [texts[-1][:-20], "no answer"]
    rows = [policy.encoder.answer(text) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    said = Completions(
        tokens=tokens, mask=mask, texts=policy.encoder.decode(tokens, mask), finished=mask.any(1)
    )
    batch = Batch(samples=samples, prefixes=prefixes)
    answers = Segmenter(policy=policy, grammar=grammar, engine=None, head=nano_head).read(batch, said, 5)
    return grammar, policy.encoder, nano_head, batch, said, answers


@pytest.mark.parametrize("potential", POTENTIALS)
def test_every_completion_adds_up_to_nothing(spoken, potential):
    grammar, encoder, head, batch, said, answers = spoken
    rewards, closes = PromptShaping(potential, 1.0)(grammar, head, encoder, batch, said, answers)
    torch.testing.assert_close(rewards.sum(1), torch.zeros(10), rtol=0, atol=1e-6)
    assert (rewards[~said.mask] == 0).all() and not closes[~said.mask].any()
    assert rewards.abs().max() > 0.2
    cut_off, silent = [3, 8], [4, 9]
    assert all(answers[n].parsed.fault is not None for n in (*cut_off, *silent))
    assert (rewards[silent] == 0).all() and not closes[silent].any()


def test_a_fault_behind_a_box_does_not_take_back_what_the_box_was_paid(spoken):
    """Otherwise breaking off would be the way to keep it."""
    grammar, encoder, head, batch, said, answers = spoken
    rewards, closes = PromptShaping(iou, 1.0)(grammar, head, encoder, batch, said, answers)
    for whole, broken in ((2, 3), (7, 8)):
        assert answers[whole].parsed.fault is None and answers[broken].parsed.fault is not None
        first = int(closes[whole].nonzero()[0])
        assert int(closes[broken].nonzero()[0]) == first
        assert rewards[broken, first] == rewards[whole, first] > 0


def test_a_reward_stands_at_the_token_that_closes_what_it_pays(spoken):
    grammar, encoder, head, batch, said, answers = spoken
    rewards, closes = PromptShaping(iou, 1.0)(grammar, head, encoder, batch, said, answers)
    for n, answer in enumerate(answers):
        for end, _ in grammar.unfold(answer.text, batch.prefixes[n // 5].frame):
            at = encoder.token_at(said.tokens[n, : answer.length], end)
            up_to = [
                encoder.decode(said.tokens[n : n + 1, :k], said.mask[n : n + 1, :k])[0] for k in (at, at + 1)
            ]
            assert len(up_to[0]) < end <= len(up_to[1])
            assert closes[n, at]


def test_the_first_box_pays_what_its_mask_is_worth(spoken):
    grammar, encoder, head, batch, said, answers = spoken
    rewards, _ = PromptShaping(iou, 1.0)(grammar, head, encoder, batch, said, answers)
    end, alone = grammar.unfold(answers[0].text, batch.prefixes[0].frame)[0]
    ((mask,),) = head.segment([batch.samples[0].image], [[alone]])
    at = encoder.token_at(said.tokens[0, : answers[0].length], end)
    assert rewards[0, at].item() == pytest.approx(iou(mask, batch.samples[0].mask), abs=1e-6)
    assert len(alone.boxes) == 1 and not len(alone.points)
