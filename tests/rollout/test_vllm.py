"""vLLM for real, on a CPU: `make test-vllm` has an environment for it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from segrl.data.synthetic import SyntheticScenes
from segrl.front_door import asset
from segrl.prompts.tags import SegR1Tags
from segrl.rollout.shared_prefix import SharedPrefixEngine

LENGTH = 80
PLAIN = """
import json, sys
from PIL import Image
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    folder, prompt, images, length = sys.argv[1], sys.argv[2], sys.argv[3:-1], int(sys.argv[-1])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, limit_mm_per_prompt={"image": 1})
    asked = [{"prompt": prompt, "multi_modal_data": {"image": Image.open(i)}} for i in images]
    for answer in llm.generate(asked, SamplingParams(temperature=0, max_tokens=length)):
        print("ANSWER" + json.dumps([list(answer.prompt_token_ids), answer.outputs[0].text]))
"""


@pytest.fixture(scope="module")
def scenes():
    return SyntheticScenes("test", 3, 0, 128, (0.5, 1.0), (1, 1))


def test_without_vllm_one_line_says_what_to_install(monkeypatch):
    import importlib.util

    from segrl.rollout.vllm import VLLMEngine

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="rollout: .*--extra vllm"):
        VLLMEngine(8, 64, 0.3, True, True)


def test_merged_weights_are_those_of_an_export(nano_weights, tmp_path):
    from segrl.models.hf_vlm import HFPolicy

    lora = {"rank": 4, "alpha": 8, "dropout": 0.0}
    policy = HFPolicy(str(nano_weights("qwen2_5_vl")), 112, None, 1.0, "float32", "sdpa", lora, False, False)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    merged = {name: value.clone() for name, value in policy.merged()}
    policy.save(tmp_path, 8)
    exported = HFPolicy(
        str(tmp_path), 112, None, 1.0, "float32", "sdpa", None, False, False
    ).model.state_dict()
    assert exported.keys() == merged.keys()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in exported.items())


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["trained qwen3_vl", "qwen2_5_vl"])
def test_an_engine_follows_its_policy(family, scenes, nano_weights):
    """Greedy completions are the policy's own, before and after its weights have moved, and not before they are pushed."""
    from segrl.models.hf_vlm import HFPolicy
    from segrl.rollout.vllm import VLLMEngine

    weights, side = (asset("policy_nano"), 128) if "trained" in family else (nano_weights(family), 112)
    policy = HFPolicy(str(weights), side, None, 1.0, "float32", "sdpa", None, True, False).eval()
    prefixes = [policy.encoder.encode(SegR1Tags(4, 8).messages(None), scenes[i].image) for i in range(3)]
    ours, engine = SharedPrefixEngine(LENGTH), VLLMEngine(LENGTH, 1024, 0.3, True, True)
    first = ours.greedy(policy, prefixes)
    same(engine.greedy(policy, prefixes), first)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    moved = ours.greedy(policy, prefixes)
    assert moved.texts != first.texts, "the weights hardly moved: the test shows nothing"
    assert engine.greedy(policy, prefixes).texts != moved.texts  # control: nobody has told the engine
    policy.has_moved()
    same(engine.greedy(policy, prefixes), moved)
    drawn = draws(policy, prefixes, engine)
    assert bool(drawn.finished.any()) == ("trained" in family)  # who was never taught does not stop


def same(one, other):
    assert one.texts == other.texts and torch.equal(one.finished, other.finished)
    assert torch.equal(one.tokens[one.mask], other.tokens[other.mask])


def draws(policy, prefixes, engine):
    """The same seeds give the same completions, each of its own prefix, drawn as the training pass finds them likely."""
    seeds = range(3 * 4)
    drawn, again = (engine.sample(policy, prefixes, 4, seeds) for _ in range(2))
    assert torch.equal(drawn.tokens, again.tokens) and len(set(drawn.texts)) > 3
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


@pytest.mark.vllm
def test_plain_vllm_loads_what_we_export_and_says_the_same(scenes, tmp_path):
    from PIL import Image

    from segrl.models.hf_vlm import HFPolicy

    policy = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", "sdpa", None, True, False).eval()
    prefixes = [policy.encoder.encode(SegR1Tags(4, 8).messages(None), scenes[i].image) for i in range(3)]
    expected = SharedPrefixEngine(LENGTH).greedy(policy, prefixes).texts
    policy.save(tmp_path / "exported", LENGTH)
    images = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(images):
        Image.fromarray(scenes[i].image).save(path)
    prompt = policy.encoder.processor.apply_chat_template(
        SegR1Tags(4, 8).messages(None), tokenize=False, add_generation_prompt=True
    )
    (tmp_path / "plain.py").write_text(PLAIN)
    out = run(
        [str(tmp_path / "plain.py"), str(tmp_path / "exported"), prompt, *map(str, images), str(LENGTH)],
        tmp_path,
    )
    answers = [
        json.loads(line.removeprefix("ANSWER")) for line in out.splitlines() if line.startswith("ANSWER")
    ]
    assert [ids for ids, _ in answers] == [p.token_ids.tolist() for p in prefixes]
    assert [text for _, text in answers] == expected


@pytest.mark.vllm
def test_grpo_learns_from_what_vllm_sampled(tmp_path):
    run(
        ["-m", "segrl.train", "+experiment=demo", "rollout=vllm", "rollout.max_tokens=64", "rollout.max_prefix=256", "rollout.eager=true",
         "logger=csv", "data.workers=0", "data.batch_size=2", "stage.group_size=4", "data.test_length=2", "data.train_length=16",
         "trainer.accelerator=cpu", "trainer.max_steps=2", "stage.mismatch_cap=2", f"paths.run={tmp_path}/run"], tmp_path,
    )  # fmt: skip
    history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    mismatch = [line["policy/mismatch"] for line in history if "policy/mismatch" in line]
    assert len(mismatch) == 2 and all(0 < value < 1e-3 for value in mismatch)


def run(arguments, folder):
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **quiet},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout
