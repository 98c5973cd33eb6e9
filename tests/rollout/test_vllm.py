"""vLLM for real in the trainer's process, on a CPU: `make test-vllm` has an environment for it."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from engines import GRPO, asks, follows, mismatches, run

from segrl.prompts.tags import SegR1Tags
from segrl.rollout import vllm_wire as wire
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.rollout.vllm import VLLMEngine
from segrl.runs.configuration import asset

LENGTH = 80
PLAIN = """
import json, sys
from PIL import Image
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    folder, prompt, images, length = sys.argv[1], sys.argv[2], sys.argv[3:-1], int(sys.argv[-1])
    one = {"image": 1}
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, limit_mm_per_prompt=one)
    asked = [{"prompt": prompt, "multi_modal_data": {"image": Image.open(i)}} for i in images]
    for answer in llm.generate(asked, SamplingParams(temperature=0, max_tokens=length)):
        print("ANSWER" + json.dumps([list(answer.prompt_token_ids), answer.outputs[0].text]))
"""


def test_without_vllm_one_line_says_what_to_install(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="rollout: .*--extra vllm"):
        VLLMEngine(8, 64, 0.3, True, True)


@pytest.mark.parametrize("sleep", [True, False])
def test_an_engine_that_slept_gets_its_weights_before_its_cache(sleep, monkeypatch):
    """Sleep of level 2 discards the weights. The engine of a pretended GPU records what it was asked."""
    monkeypatch.setattr(wire, "needs_vllm", lambda extra: None)
    engine, llm = VLLMEngine(8, 100, 0.3, sleep=sleep, eager=True), mock.MagicMock()
    monkeypatch.setattr(engine, "_start", lambda policy: llm)
    policy = SimpleNamespace(device=torch.device("cuda"), weights_version=0, merged=lambda: "weights")
    update = [
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_prefix_cache",
        "llm_engine.reset_encoder_cache",
    ]
    asked = []
    for weights_version in (0, 0, 1):
        policy.weights_version = weights_version
        llm.reset_mock()
        engine._wake(policy)
        asked.append([(name, given.get("tags")) for name, _, given in llm.mock_calls])
    filled = [(name, None) for name in update]
    woken = [("wake_up", ["weights"]), *filled, ("wake_up", ["kv_cache"])]
    assert asked == ([filled, woken, woken] if sleep else [filled, [], filled])


def test_merged_weights_are_those_of_an_export(nano_weights, tmp_path):
    from segrl.models.hf_vlm import HFPolicy

    lora = {"rank": 4, "alpha": 8, "dropout": 0.0}
    policy = HFPolicy(str(nano_weights("qwen2_5_vl")), 112, None, 1.0, "float32", lora, False, False)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    merged = {name: value.clone() for name, value in policy.merged()}
    policy.save(tmp_path, 8)
    exported = HFPolicy(str(tmp_path), 112, None, 1.0, "float32", None, False, False).model.state_dict()
    assert exported.keys() == merged.keys()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in exported.items())


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["trained qwen3_vl", "qwen2_5_vl"])
def test_an_engine_follows_its_policy(family, scenes, nano_weights):
    from segrl.models.hf_vlm import HFPolicy

    weights, side = (asset("policy_nano"), 128) if "trained" in family else (nano_weights(family), 112)
    policy = HFPolicy(str(weights), side, None, 1.0, "float32", None, True, False).eval()
    prefixes = asks(policy, scenes)
    drawn = follows(VLLMEngine(LENGTH, 1024, 0.2, True, True), policy, prefixes, LENGTH)
    assert bool(drawn.finished.any()) == ("trained" in family)  # an untrained policy does not stop


@pytest.mark.vllm
def test_plain_vllm_loads_what_we_export_and_says_the_same(scenes, tmp_path):
    from PIL import Image

    from segrl.models.hf_vlm import HFPolicy

    policy = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False).eval()
    prefixes = asks(policy, scenes)
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
def test_grpo_learns_from_what_an_engine_per_rank_sampled(tmp_path):
    run(
        [*GRPO, "rollout=vllm", "rollout.memory=0.2", "rollout.eager=true", f"paths.run={tmp_path}/run"],
        tmp_path,
    )
    assert 0 < max(mismatches(tmp_path / "run")) < 1e-3
