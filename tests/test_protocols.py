"""The protocols of a policy are true: an object that has just their members is sampled from and trained."""

from __future__ import annotations

from functools import partial

import lightning
import numpy as np
import pytest
import torch

from segrl.models.reference import FrozenCopy
from segrl.models.value_head import DetachedCritic
from segrl.objectives.advantages import group_relative
from segrl.objectives.clipped import ppo_clip
from segrl.objectives.gae import constant_decay
from segrl.objectives.kl import k3
from segrl.objectives.masked import per_token
from segrl.objectives.policy_gradient import PolicyGradient
from segrl.prompts.tags import SegR1Tags
from segrl.protocols import AdaptablePolicy, DecodablePolicy, Policy, ServedPolicy, TrainablePolicy
from segrl.rewards.mixture import RewardMixture
from segrl.rollout import vllm_wire as wire
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.segmenter import Segmenter
from segrl.stages.base import Optimization
from segrl.stages.grpo import GRPOStage
from segrl.stages.policy_gradient import Loop
from segrl.stages.ppo import CriticLearning, PPOStage
from segrl.stages.sft import SFTStage
from segrl.types import Batch, Completions, Sample
from tiny_policy import LETTERS, ServedTinyPolicy, TinyPolicy


def prefixes(policy, count):
    return [policy.encoder.encode([], np.zeros((4, 4, 3), np.uint8)) for _ in range(count)]


def batch_of(policy, count, answers=None):
    image = np.zeros((4, 4, 3), np.uint8)
    samples = [Sample(id=str(i), image=image, mask=image[..., 0] > 0) for i in range(count)]
    return Batch(samples=samples, prefixes=prefixes(policy, count), answers=answers)


class NoHead(torch.nn.Module):
    """Empty masks."""

    def prepare(self, images):
        pass

    def segment(self, images, prompts):
        return [[image[..., 0] > 0 for _ in some] for image, some in zip(images, prompts, strict=True)]


def segmenter():
    engine = SharedPrefixEngine(6)
    return Segmenter(policy=TinyPolicy(), grammar=SegR1Tags(4, 4), engine=engine, head=NoHead())


def fit(stage, batches):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(stage, torch.utils.data.DataLoader(batches, batch_size=None))


def test_the_real_and_the_tiny_policy_satisfy_the_protocols(nano_policy):
    for one in (nano_policy("qwen3_vl"), nano_policy("qwen2_5_vl"), ServedTinyPolicy()):
        for protocol in (Policy, DecodablePolicy, TrainablePolicy, ServedPolicy):
            assert isinstance(one, protocol), protocol
    assert isinstance(nano_policy("qwen3_vl"), AdaptablePolicy)
    assert not isinstance(TinyPolicy(), ServedPolicy | AdaptablePolicy)


def test_what_is_asked_of_vllm_needs_no_more_of_a_policy_than_the_protocol():
    tiny, (prefix,) = ServedTinyPolicy(), prefixes(ServedTinyPolicy(), 1)
    asked = wire.settings(tiny, 4, 0.7, 2**31 + 5, 9)
    assert (asked["n"], asked["seed"], asked["max_tokens"], asked["stop_token_ids"]) == (4, 5, 9, [2])
    said = [
        wire.VLLMCompletion(tokens=[1, 2], logprobs=[-0.1, -0.2], finished=True),
        wire.VLLMCompletion(tokens=[0], logprobs=[-0.3], finished=False),
    ]
    wire.check_read(prefix, [0, 0])
    found = wire.completions(tiny, said)
    assert found.texts == ["b", "a"] and found.finished.tolist() == [True, False]
    assert found.sampled_logprobs.tolist() == [
        [pytest.approx(-0.1), pytest.approx(-0.2)],
        [pytest.approx(-0.3), 0],
    ]


def test_the_engine_samples_the_tables_distribution_and_decodes_its_chain():
    tiny, engine = TinyPolicy(), SharedPrefixEngine(2)
    with torch.no_grad():
        tiny.table.copy_(torch.tensor([[0.3, 1.0, -0.5], [0.0, -1.0, 0.7], [9.0, 9.0, 9.0]]))
    chances = tiny.table.detach().softmax(-1)
    drawn = engine.sample(tiny, prefixes(tiny, 4), 1000, list(range(4000)))
    again = engine.sample(tiny, prefixes(tiny, 4), 1000, list(range(4000)))
    assert torch.equal(drawn.tokens, again.tokens)
    for text, chance in {
        "": chances[0, 2], "a": chances[0, 0] * chances[0, 2], "ba": chances[0, 1] * chances[1, 0]
    }.items():  # fmt: skip
        assert drawn.texts.count(text) / 4000 == pytest.approx(float(chance), abs=0.025), text
    assert all(t.count("a") + t.count("b") == n - f for t, n, f in zip(
        drawn.texts, drawn.lengths.tolist(), drawn.finished.tolist(), strict=True
    ))  # fmt: skip
    greedy = engine.greedy(tiny, prefixes(tiny, 2))
    assert greedy.texts == ["b", "b"] and greedy.finished.all()  # a -> b -> the end


def loop_of(parts):
    """Return what all stages of reinforcement learning take; the reward is the share of the letter b."""
    return {
        "segmenter": parts, "reference": FrozenCopy, "seed": 1,
        "reward": RewardMixture(
            {"b": {"fn": lambda answer, sample: answer.text.count("b") / 6, "weight": 1.0}}
        ),
        "objective": PolicyGradient(
            surrogate=partial(ppo_clip, low=0.2, high=0.2), token_weights=per_token, divergence=k3,
            kl_weight=1e-3, kl_reward=0.0, mismatch_cap=None,
        ),
        "loop": Loop(
            group_size=8, micro_batch_size=2, completions_per_pass=4, updates_per_rollout=2,
            epochs_per_rollout=1,
        ),
        "optimization": Optimization(
            optimizer=partial(torch.optim.AdamW, lr=0.1), schedule=None, max_grad_norm=1.0
        ),
    }  # fmt: skip


def test_a_policy_that_cannot_be_trained_is_refused_at_once():
    parts = segmenter()
    parts.policy = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="policy: must satisfy .*TrainablePolicy; Linear does not"):
        SFTStage(
            segmenter=parts, seed=1, trace=None, also=[], micro_batch_size=2,
            optimization=loop_of(parts)["optimization"],
        )  # fmt: skip


def test_ppo_teaches_the_tiny_policy_what_is_rewarded():
    parts = segmenter()
    learning = CriticLearning(
        critic_lr=0.05, critic_warmup=4, critic_decay=1.0, value_clip=10.0, value_weight=1.0
    )
    stage = PPOStage(
        **loop_of(parts), critic=partial(DetachedCritic, insight=0, prior=0.3), learning=learning,
        shaping=None, decay=partial(constant_decay, decay=1.0), discount=1.0,
    )  # fmt: skip
    fit(stage, [batch_of(parts.policy, 4) for _ in range(25)])
    assert parts.policy.table.detach().softmax(-1)[1, LETTERS.index("b")] > 0.8


def test_grpo_teaches_the_tiny_policy_what_is_rewarded():
    """The table starts uniform."""
    parts = segmenter()
    stage = GRPOStage(**loop_of(parts), advantage=partial(group_relative, floor=1e-4), live_samples=None)
    stage.reference.made_for(torch.bfloat16)  # it has no linear layer to cast
    fit(stage, [batch_of(parts.policy, 4) for _ in range(25)])
    chances = parts.policy.table.detach().softmax(-1)
    assert chances[0, LETTERS.index("b")] > 0.8 and chances[1, LETTERS.index("b")] > 0.8
    assert parts.policy.weights_version == 50


def test_sft_teaches_the_tiny_policy_what_is_written():
    parts = segmenter()
    stage = SFTStage(
        segmenter=parts, seed=1, trace=None, also=[], micro_batch_size=2,
        optimization=Optimization(
            optimizer=partial(torch.optim.AdamW, lr=0.1), schedule=None, max_grad_norm=1.0
        ),
    )  # fmt: skip
    answers = [parts.policy.encoder.answer("bb") for _ in range(4)]
    fit(stage, [batch_of(parts.policy, 4, answers) for _ in range(40)])
    said = Completions(
        tokens=torch.stack(answers), mask=torch.ones(4, 3, dtype=torch.bool), texts=[], finished=torch.ones(4)
    )
    likely = parts.policy.logprobs(prefixes(parts.policy, 4), said).detach()
    assert likely[:, 0].exp().min() > 0.8  # the first letter; after b either b or the end is right
    torch.testing.assert_close(likely[0, 1:].exp(), torch.tensor([0.5, 0.5]), rtol=0, atol=0.1)
