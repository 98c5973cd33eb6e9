"""Each path that only a GPU takes gives the results of the plain path and of the CPU.

`pytest -m gpu` runs these tests, and those of single kernels in tests/models, on a GPU; `pytest -m gpu
--rehearse` runs the same code on a CPU. MLflow, vLLM and DeepSpeed are not needed; a test that needs one of
them is skipped without it.
"""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from segrl.data.synthetic import SyntheticScenes
from segrl.models.hf_vlm import HFPolicy
from segrl.models.kernels import suffix_attention, window_attention
from segrl.models.reference import AdapterOff, FrozenCopy
from segrl.prompts.tags import SegR1Points, SegR1Tags
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.runs.configuration import asset
from segrl.segmenter import Segmenter
from segrl.types import Batch, Completions, MaskPrompt

pytestmark = pytest.mark.gpu
LENGTHS, TOKENS = (30, 1, 17, 25, 8, 29, 12, 30), 30
SCENES = SyntheticScenes("test", 4, 0, 128, (0.5, 1.0), (1, 1))
HALF = pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])


def trained(lora=None, recompute=False, weights=None, side=128):
    """Return the shipped nano policy, a Qwen3-VL, or that of a folder, with an adapter that changes its
    output.
    """
    torch.manual_seed(0)  # an adapter begins with noise
    folder = str(weights or asset("policy_nano"))
    policy = HFPolicy(folder, side, None, 1.0, "float32", lora, lora is None, recompute)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return policy


def asked(policy):
    """Return two prefixes of unequal length."""
    chats = SegR1Tags(4, 8).messages(None), SegR1Points(8).messages("the left fish")
    return [policy.encoder.encode(chat, SCENES[i].image) for i, chat in enumerate(chats)]


def said(policy, device):
    tokens = torch.randint(0, 300, (len(LENGTHS), TOKENS), generator=torch.Generator().manual_seed(0))
    tokens = tokens.masked_fill(torch.isin(tokens, policy.never_sampled.cpu()), 0)
    mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    given = {"tokens": tokens.to(device), "mask": mask.to(device), "finished": mask[:, 0].to(device)}
    return Completions(texts=[""] * len(LENGTHS), **given)


def passes(device, half):
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def learned(policy, device, half):
    """Return log-probabilities, and the gradient of a weighted sum of them, on the CPU."""
    policy, given = policy.to(device), [prefix.to(device) for prefix in asked(policy)]
    weights = torch.linspace(-1, 1, len(LENGTHS) * TOKENS, device=device).view(len(LENGTHS), TOKENS)
    with passes(device, half):
        logprobs = policy.logprobs(given, said(policy, device))
        (logprobs * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None])
    return logprobs.detach().float().cpu(), gradient


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def policy_of(request, nano_weights):
    """Return a function that makes policies of a family.

    The families are the one that ships, and an untrained Qwen2.5-VL, whose tower has windows.
    """

    def make(rank=0, recompute=False):
        if request.param == "qwen3_vl":
            return trained(lora_of(rank), recompute)
        return trained(lora_of(rank), recompute, nano_weights("qwen2_5_vl"), 112)

    return make


@pytest.fixture(scope="module")
def expected(policy_of):
    """Return what the CPU computes in float32, with and without an adapter."""
    cpu = torch.device("cpu")
    return {rank: learned(policy_of(rank), cpu, False) for rank in (0, 4)}


def lora_of(rank):
    return {"rank": rank, "alpha": 8, "dropout": 0.0} if rank else None


def test_no_kernel_falls_back_here(gpu):
    """If one fell back, the other tests would compare the plain path with itself."""
    if gpu.type == "cpu":
        assert not suffix_attention.has_kernel(gpu, torch.bfloat16)
        return
    assert suffix_attention.has_kernel(gpu, torch.bfloat16) and not suffix_attention.has_kernel(
        gpu, torch.float32
    )
    assert window_attention._kernel_repeats(gpu, torch.bfloat16)


@HALF
@pytest.mark.parametrize("rank", [0, 4], ids=["weights", "adapter"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_what_is_learned_is_what_the_cpu_learns(gpu, policy_of, expected, half, rank, recompute):
    logprobs, gradient = learned(policy_of(rank, recompute), gpu, half)
    of_logprobs, of_gradient = expected[rank]
    off = (logprobs - of_logprobs).abs()
    apart = (gradient - of_gradient).norm() / of_gradient.norm()
    # In bfloat16 the CPU itself is off by .04 at most, .007 in the mean, and 1.2% of the gradient.
    most, mean, share = (0.15, 0.02, 0.05) if half else (1e-3, 1e-4, 1e-3)
    assert off.max() < most and off.mean() < mean and apart < share, (off.max(), off.mean(), apart)
    assert half is (float(off.max()) > 1e-3)


@HALF
@pytest.mark.parametrize("rank", [0, 4], ids=["weights", "adapter"])
def test_what_is_sampled_is_what_the_training_pass_finds_likely(gpu, policy_of, half, rank):
    """Sampling is greedy and uses graphs, which must record."""
    policy = policy_of(rank).to(gpu)
    given = [prefix.to(gpu) for prefix in asked(policy)]
    with torch.no_grad(), passes(gpu, half):
        completions = SharedPrefixEngine(TOKENS, graphs=True).greedy(policy, given)
        logits = policy.logits(policy.read(given, completions), policy.head())
        best, said_so = logits.amax(-1), logits.gather(-1, completions.tokens[..., None])[..., 0]
    # Where two tokens are nearly as likely, either side may take either.
    assert (best - said_so)[completions.mask].max() < (0.2 if half else 1e-3)


@HALF
def test_graphs_sample_what_is_sampled_without(gpu, policy_of, half, monkeypatch):
    """Completions pass places at which steps are recorded anew, and stop tokens are so frequent that rows
    leave.
    """
    policy = policy_of().to(gpu)
    monkeypatch.setitem(policy._buffers, "stop_ids", torch.arange(0, 400, 40, device=gpu))
    given = [prefix.to(gpu) for prefix in asked(policy)]
    with passes(gpu, half):
        tokens = [
            SharedPrefixEngine(140, graphs).sample(policy, given, 8, range(16)).tokens[:, :20]
            for graphs in (True, False)
        ]
    wide = min(part.shape[1] for part in tokens)
    # Both sides sum in another order, so a token on the edge of the noise may become the next one.
    assert (tokens[0][:, :wide] == tokens[1][:, :wide]).float().mean() > (0.8 if half else 0.99)


def test_memory_of_graphs_is_used_again(gpu):
    """The fourth rollout reserves no more than the second, up to one segment of the allocator."""
    policy, reserved = trained().to(gpu), []
    given = [prefix.to(gpu) for prefix in asked(policy)]
    engine = SharedPrefixEngine(20, graphs=True)
    for _ in range(4):
        engine.sample(policy, given, 8, range(16))
        reserved.append(torch.cuda.memory_reserved() if gpu.type == "cuda" else 0)
    assert reserved[3] <= reserved[1] + 2**21


@HALF
def test_references_give_the_logprobs_that_the_policy_gave(gpu, half):
    policy = trained(lora_of(4)).to(gpu)
    given, completions = [prefix.to(gpu) for prefix in asked(policy)], said(policy, gpu)
    copy_of = FrozenCopy(policy)
    if half:
        copy_of.made_for(torch.bfloat16)
    with torch.no_grad(), passes(gpu, half):
        own = policy.logprobs(given, completions)
        assert (copy_of.logprobs(given, completions) - own).abs().max() < (1e-2 if half else 1e-4)
        off = AdapterOff(policy).logprobs(given, completions)
        plain = trained().to(gpu).logprobs(given, completions)
    assert (off - plain).abs().max() < (1e-2 if half else 1e-4) < (own - plain).abs().max()


def test_masks_are_those_of_the_cpu_and_encoding_beside_changes_nothing(gpu, nano_head):
    images = [SCENES[i].image for i in range(4)]
    prompts = [[MaskPrompt.of([[0.1, 0.1, 0.9, 0.9]]), MaskPrompt.of(points=[[0.5, 0.5]], labels=[1])]] * 4
    expected = nano_head.segment(images, prompts)
    there = copy.deepcopy(nano_head).to(gpu)
    plain = there.segment(images, prompts)
    there.embeddings.forget()
    there.prepare(images)
    beside = there.segment(images, prompts)
    for ours, again, theirs in zip(plain, beside, expected, strict=True):
        for mask, same, other in zip(ours, again, theirs, strict=True):
            assert np.array_equal(mask, same)
            assert (mask == other).mean() > 0.995


def test_a_batch_copied_from_pinned_memory_is_unchanged(gpu):
    policy = trained()
    batch = Batch(
        samples=[SCENES[i] for i in range(2)], prefixes=asked(policy), answers=[torch.arange(3)] * 2
    )
    sent = (batch.pin_memory() if gpu.type == "cuda" else batch).to(gpu)
    if gpu.type == "cuda":
        torch.cuda.synchronize()
    for one, other in zip(sent.prefixes, batch.prefixes, strict=True):
        for name in ("token_ids", "token_types", "pixels", "positions"):
            assert getattr(one, name).device.type == gpu.type
            assert torch.equal(getattr(one, name).cpu(), getattr(other, name))
        assert one.grid.device.type == "cpu"


SMALL = ("logger=csv", "data.workers=0", "data.batch_size=2", "data.test_length=4", "test_before=false",
         "rollout.max_tokens=32", "trainer.max_steps=1")  # fmt: skip
STAGES = {
    "grpo": ("+experiment=demo", "stage.micro_batch_size=2"),
    "ppo": ("+experiment=demo", "stage=ppo", "stage.critic_warmup=0", "reference=frozen_copy",
            "stage.schedule=null", "stage.updates_per_rollout=1"),
    "sft": ("+experiment=nano_sft", f"policy.weights={asset('policy_nano')}"),
}  # fmt: skip


def first_update(folder):
    lines = (folder / "history.jsonl").read_text().splitlines()
    return next(row for row in map(json.loads, lines) if "policy/grad_norm" in row or "sft/loss" in row)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_begins_as_on_the_cpu(gpu, cli, tmp_path, stage):
    """Through the command line: the first update in float32 beside the CPU's, and one in half precision."""
    runs = {
        "cpu": ("trainer.accelerator=cpu", "trainer.precision=32-true"),
        "float32": (f"trainer.accelerator={accelerator(gpu)}", "trainer.precision=32-true"),
        "bfloat16": (f"trainer.accelerator={accelerator(gpu)}", "trainer.precision=bf16-mixed"),
    }
    if gpu.type == "cpu":
        del runs["float32"]  # it is the first one again
    found = {}
    for name, how in runs.items():
        code, _, err = cli(*STAGES[stage], *SMALL, *how, f"paths.run={tmp_path}/{name}")
        assert code == 0, err
        found[name] = first_update(tmp_path / name)
    shown = {"sft/loss", "reward/total", "rollout/length", "policy/grad_norm", "critic/value_loss"}
    keys = shown & found["cpu"].keys()
    assert len(keys) >= (1 if stage == "sft" else 3)
    for key in keys:
        if "float32" in found:
            assert found["float32"][key] == pytest.approx(found["cpu"][key], rel=0.02, abs=0.02), key
        if key in ("sft/loss", "reward/total"):  # in half precision other tokens may be sampled
            assert found["bfloat16"][key] == pytest.approx(found["cpu"][key], rel=0.3, abs=0.1), key
    assert all(np.isfinite(value) for row in found.values() for value in row.values() if value is not None)


def accelerator(gpu):
    return "gpu" if gpu.type == "cuda" else "cpu"


def test_evaluation_scores_as_on_the_cpu(gpu, cli, tmp_path):
    suite = (
        "+suite=synthetic",
        "testsets.synthetic.samples.length=8",
        "testsets.synthetic.published=8",
        "logger=csv",
    )
    scores = {}
    for name in ("cpu", accelerator(gpu)):
        folder = tmp_path / name
        code, _, err = cli(*suite, f"trainer.accelerator={name}", f"paths.run={folder}", module="evaluate")
        assert code == 0, err
        of = json.loads((folder / "metrics.json").read_text())["datasets"]["synthetic"]
        scores[name] = of["scores"]["iou"]["value"]
    assert scores[accelerator(gpu)] == pytest.approx(scores["cpu"], abs=0.03)


def test_an_exported_policy_answers_as_before(gpu, cli, tmp_path):
    run, out = tmp_path / "run", tmp_path / "policy"
    code, _, err = cli(*STAGES["grpo"], *SMALL, f"trainer.accelerator={accelerator(gpu)}", f"paths.run={run}")
    assert code == 0, err
    code, _, err = cli(f"ckpt={run}/checkpoints/last.ckpt", f"out={out}", module="export", runs=None)
    assert code == 0, err
    segmenter = Segmenter.from_pretrained(out)
    plain = segmenter.segment(SCENES[0].image)
    segmenter.policy.to(gpu)
    segmenter.head.to(gpu)
    there = segmenter.segment(SCENES[0].image)
    assert there.text == plain.text and (there.mask == plain.mask).mean() > 0.995


def test_zero_on_one_device_ends_where_plain_training_does(gpu, tmp_path):
    pytest.importorskip("deepspeed")
    states = {}
    for name in ("single", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"):
        command = [
            sys.executable, "-m", "segrl.train", *STAGES["grpo"], *SMALL, "stage.optimizer.lr=1e-4",
            "stage.optimizer.eps=1e-3", "stage.schedule=null", f"trainer.accelerator={accelerator(gpu)}",
            "trainer.devices=1", f"paths.run={tmp_path}/{name}",
            *([] if name == "single" else [f"trainer={name}"]),
        ]  # fmt: skip
        there = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if gpu.type == "cpu" else {})}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=there, timeout=120)
        assert done.returncode == 0, (done.stderr + done.stdout)[-4000:]
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        states[name] = torch.load(path, weights_only=True)["state_dict"]
    start = {f"policy.{name}": value for name, value in trained().state_dict().items()}
    assert apart(start, states["single"]) > 1e-5
    for name, state in states.items():
        assert state.keys() == states["single"].keys() and apart(state, states["single"]) < 1e-6, name


def apart(one, other):
    return max((value - other[name]).abs().max() for name, value in one.items() if name in other)


def test_vllm_in_process_samples_what_the_policy_samples(gpu, tmp_path):
    pytest.importorskip("vllm")
    from segrl.rollout.vllm import VLLMEngine

    policy = trained().to(gpu)
    given = [prefix.to(gpu) for prefix in asked(policy)]
    engine = VLLMEngine(TOKENS, 1024, 0.2, True, False)
    ours, theirs = SharedPrefixEngine(TOKENS).greedy(policy, given), engine.greedy(policy, given)
    assert ours.texts == theirs.texts
    assert engine.greedy(policy, given).texts == theirs.texts  # after sleep
