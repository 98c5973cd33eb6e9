"""The contract of engines that sample outside the policy itself."""

import json
import os
import subprocess
import sys

import torch

from segrl.prompts.tags import SegR1Tags
from segrl.rollout.shared_prefix import SharedPrefixEngine

QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
GRPO = [
    "-m", "segrl.train", "+experiment=demo", "rollout.max_tokens=64", "rollout.max_prefix=256", "logger=csv",
    "data.workers=0", "data.batch_size=2", "stage.group_size=4", "data.test_length=2", "data.train_length=16",
    "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=2", "stage.mismatch_cap=2",
]  # fmt: skip


def asks(policy, scenes):
    return [policy.encoder.encode(SegR1Tags(4, 8).messages(None), scenes[i].image) for i in range(3)]


def follows(engine, policy, prefixes, length):
    """Check that greedy completions are the policy's own, before and after its weights have changed.

    Drawn completions must be as likely as the policy finds them.
    """
    ours = SharedPrefixEngine(length)
    first = ours.greedy(policy, prefixes)
    same(engine.greedy(policy, prefixes), first)
    move(policy)
    moved = ours.greedy(policy, prefixes)
    assert moved.texts != first.texts, "the weights hardly moved: the test shows nothing"
    same(engine.greedy(policy, prefixes), moved)
    return draws(engine, policy, prefixes)


def move(policy):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    policy.bump_version()


def same(one, other):
    assert one.texts == other.texts and torch.equal(one.finished, other.finished)
    assert torch.equal(one.tokens[one.mask], other.tokens[other.mask])


def draws(engine, policy, prefixes):
    """Check that equal seeds give equal completions, each of its own prefix.

    They must be drawn as the training pass finds them likely.
    """
    seeds = range(3 * 4)
    drawn, again = (engine.sample(policy, prefixes, 4, seeds) for _ in range(2))
    assert len(drawn.tokens) == 12 and torch.equal(drawn.tokens, again.tokens)
    assert len(set(drawn.texts)) > 6
    assert not torch.isin(drawn.tokens, policy.never_sampled).any()
    ends = torch.isin(drawn.tokens, policy.stop_ids)
    for n, length in enumerate(drawn.lengths.tolist()):
        assert bool(ends[n, length - 1]) == bool(drawn.finished[n])
    with torch.no_grad():
        ours = policy.logprobs(prefixes, drawn)
    assert ((ours - drawn.sampled_logprobs) * drawn.mask).abs().max() < 1e-3
    shuffled = policy.logprobs([prefixes[1], prefixes[2], prefixes[0]], drawn).detach()
    assert ((shuffled - drawn.sampled_logprobs) * drawn.mask).abs().max() > 0.01  # control: the images matter
    return drawn


def mismatches(run_folder):
    """Return the distance of the two log-probabilities at each update of a run."""
    history = [json.loads(line) for line in (run_folder / "history.jsonl").read_text().splitlines()]
    found = [line["policy/mismatch"] for line in history if "policy/mismatch" in line]
    assert len(found) == 2
    return found


def run(arguments, folder):
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env={**os.environ, **QUIET},
        timeout=600
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout
