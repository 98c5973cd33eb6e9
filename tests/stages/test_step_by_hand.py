"""One GRPO step written out with segrl's own functions ends with the weights of the stage's step."""

from functools import partial

import numpy as np
import torch
from hydra.utils import instantiate

from segrl.data.collate import Collate
from segrl.objectives.advantages import group_relative
from segrl.objectives.clipped import ppo_clip
from segrl.objectives.kl import k3
from segrl.objectives.masked import per_sequence
from segrl.objectives.policy_gradient import policy_gradient
from segrl.runs.configuration import compose_job, register_resolvers
from segrl.segmenter import Segmenter

SAMPLES, GROUP, SEED, RATE = 4, 3, 1, 1e-3
OVERRIDES = (
    "+experiment=demo", "logger=csv", f"seed={SEED}", "trainer.accelerator=cpu", "trainer.max_steps=1",
    "test_before=false", f"data.batch_size={SAMPLES}", "data.train_length=16", "data.test_length=1",
    "data.workers=0", "rollout.max_tokens=24", f"stage.group_size={GROUP}",
    f"stage.micro_batch_size={SAMPLES}", f"stage.optimizer.lr={RATE}", "stage.schedule=null",
)  # fmt: skip


def test_a_step_by_hand_is_the_stages_step(cli, tmp_path):
    # The parts as the demo configures them: nano Qwen3-VL, nano SAM 2, Seg-R1's tags, and a reward of IoU,
    # S-measure and format.
    register_resolvers()
    cfg = compose_job("train", [*OVERRIDES, "paths.run=unused"])
    policy, grammar, head = instantiate(cfg.policy), instantiate(cfg.grammar), instantiate(cfg.head)
    engine, reward, scenes = (
        instantiate(cfg.rollout),
        instantiate(cfg.reward),
        instantiate(cfg.data.module.train),
    )
    segmenter = Segmenter(policy=policy, grammar=grammar, engine=engine, head=head)

    # Data: B images and queries. Pixels and token ids are made once per sample. The seed gives the order.
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(SEED * 1_000_003))
    batch = Collate(policy.encoder, grammar)([scenes[i] for i in order[:SAMPLES].tolist()])

    # Rollout: N = B * G completions, one seed each; each prefix is read once for its group.
    places = [(b, g) for b in range(SAMPLES) for g in range(GROUP)]
    seeds = [int(np.random.SeedSequence([SEED, 0, b, g]).generate_state(1)[0]) for b, g in places]
    policy.train()
    completions = engine.sample(policy, batch.prefixes, GROUP, seeds)

    # Parse each completion, let SAM 2 turn mask prompts into masks, and compare the masks with ground truth.
    answers = segmenter.read(batch, completions, GROUP)
    scores = reward(answers, batch.samples)  # total: [B, G]

    # A completion is worth its reward relative to its group; every token of it counts with the same share.
    advantages = group_relative(scores.total, floor=1e-4).flatten()[:, None] * completions.mask
    weights = per_sequence(completions.mask, GROUP, float(completions.mask.sum()))

    # One update: L = sum of -A * ratio over tokens. The ratio is 1, because the policy that sampled learns.
    logprobs = policy.logprobs(batch.prefixes, completions)  # [N, T]
    clip = partial(ppo_clip, low=0.2, high=0.2)
    loss = policy_gradient(logprobs, None, None, advantages.float(), weights, clip, k3, kl_weight=0.0).loss
    loss.backward()
    learns = [p for p in policy.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(learns, 1.0)
    optimizer = torch.optim.AdamW(learns, lr=RATE, fused=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer.step()

    # The stage does the same.
    code, _, err = cli(*OVERRIDES, f"paths.run={tmp_path}/run")
    assert code == 0, err
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    start = dict(instantiate(cfg.policy).named_parameters())
    mine = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    assert any(not torch.equal(value, start[name]) for name, value in mine.items())
    for name, value in mine.items():
        torch.testing.assert_close(saved[f"policy.{name}"], value, rtol=0, atol=1e-6)
