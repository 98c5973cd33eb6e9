"""Decoding one token at a time gives the values of the training pass, also after rows have left."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segrl.data.synthetic import SyntheticScenes
from segrl.models.kernels.cuda_graph import GraphRecorder
from segrl.models.kernels.decoder import Decoder
from segrl.prompts.tags import SegR1Tags
from segrl.rollout import shared_prefix
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.types import Completions

GROUP, LENGTH = 3, 7


def told(policy, rows=2 * GROUP):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (rows, LENGTH), generator=generator)
    every = torch.ones_like(tokens, dtype=torch.bool)
    return Completions(tokens=tokens, mask=every, texts=[""] * rows, finished=every.any(1))


@torch.no_grad()
@pytest.mark.parametrize("stride", [None, 1, 4, 100])
def test_steps_of_one_token_give_the_values_of_the_training_pass(policy, prefixes, stride):
    said = told(policy)
    hidden = policy.read(prefixes, said)
    decoder = policy.decoder(policy.prefill(prefixes), GROUP, LENGTH, stride)
    for place in range(LENGTH - 1):
        assert (decoder.step(said.tokens[:, place]) - hidden[:, place + 1]).abs().max() < 2e-5


@torch.no_grad()
def test_a_step_may_be_computed_twice_and_does_not_read_later_places(policy, prefixes):
    """Recording a step as a graph relies on both."""
    said = told(policy)
    decoder = policy.decoder(policy.prefill(prefixes), GROUP, LENGTH, 4)
    decoder.step(said.tokens[:, 0])
    first = decoder._read(said.tokens[:, 1], 4)
    for layer in decoder.layers:
        layer.own[..., 2:, :] = 9.0
    assert torch.equal(decoder._read(said.tokens[:, 1], 4), first)
    assert torch.equal(decoder.step(said.tokens[:, 1]), first)


@torch.no_grad()
@pytest.mark.parametrize("stride", [None, 4])
def test_rows_that_stay_continue_as_if_no_row_had_left(policy, prefixes, stride):
    said = told(policy)
    hidden = policy.read(prefixes, said)
    decoder = policy.decoder(policy.prefill(prefixes), GROUP, LENGTH, stride)
    decoder.step(said.tokens[:, 0])
    decoder.step(said.tokens[:, 1])
    decoder.keep(torch.tensor([1]), torch.tensor([[2, 0]]))
    rows = [GROUP + 2, GROUP]
    for place in range(2, LENGTH - 1):
        assert (decoder.step(said.tokens[rows, place]) - hidden[rows, place + 1]).abs().max() < 2e-5


@torch.no_grad()
def test_steps_in_half_precision_stay_near_those_in_float32(policy, prefixes):
    said = told(policy)
    hidden = policy.read(prefixes, said)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = policy.decoder(policy.prefill(prefixes), GROUP, LENGTH)
        half = torch.stack([decoder.step(said.tokens[:, place]) for place in range(LENGTH - 1)], 1)
    difference = (half - hidden[:, 1:]).abs()
    assert decoder.layers[0].qkv.weight.dtype == torch.bfloat16 and half.dtype == torch.float32
    assert 0 < difference.mean() < 0.05 * hidden.abs().mean()


@torch.no_grad()
def test_completions_do_not_depend_on_who_else_is_sampled(policy, prefixes, monkeypatch):
    """Stop tokens are so frequent that rows and prompts leave during sampling; sampled alone, none leaves."""
    monkeypatch.setitem(policy._buffers, "stop_ids", torch.arange(0, 400, 6))
    engine, kept = SharedPrefixEngine(24), []
    from segrl.models.kernels.decoder import Decoder

    keep = Decoder.keep
    monkeypatch.setattr(Decoder, "keep", lambda *given: kept.append(1) or keep(*given))
    together = engine.sample(policy, prefixes, 8, range(16))
    assert kept, "nobody left: the test shows nothing"
    for n in range(16):
        alone = engine.sample(policy, [prefixes[n // 8]], 1, [n])
        length = int(alone.lengths[0])
        assert int(together.lengths[n]) == length and bool(together.finished[n]) == bool(alone.finished[0])
        assert torch.equal(together.tokens[n, :length], alone.tokens[0])


@torch.no_grad()
@pytest.mark.parametrize("group_size", [1, 3])
def test_completions_do_not_depend_on_how_many_prompts_advance_together(policy, prefixes, group_size):
    given = [*prefixes, prefixes[0]]
    seeds = range(3 * group_size)
    at_once = SharedPrefixEngine(24).sample(policy, given, group_size, seeds)
    for parts in (1, 2):
        engine = SharedPrefixEngine(24, prefixes_at_once=parts)
        sampled = engine.sample(policy, given, group_size, seeds)
        assert torch.equal(sampled.mask, at_once.mask) and sampled.texts == at_once.texts
        assert torch.equal(sampled.tokens[sampled.mask], at_once.tokens[at_once.mask])
        assert torch.equal(sampled.finished, at_once.finished)
    assert engine.greedy(policy, given).texts == SharedPrefixEngine(24).greedy(policy, given).texts


def adapted(weights, dtype, size):
    """Return a policy whose adapter changes its output, and one prefix."""
    from segrl.models.hf_vlm import HFPolicy

    lora = {"rank": 4, "alpha": 8, "dropout": 0.0}
    policy = HFPolicy(str(weights), 128, None, 1.0, dtype, lora, False, False)
    torch.manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size)
    scene = SyntheticScenes("test", 1, 0, 128, (0.5, 1.0), (1, 1))[0].image
    return policy, [policy.encoder.encode(SegR1Tags(4, 8).messages(None), scene)]


@torch.no_grad()
def test_an_adapter_counts_and_is_left_out_where_it_is_off(nano_weights):
    policy, prefixes = adapted(nano_weights("qwen3_vl"), "float32", 0.1)
    said, steps = told(policy, GROUP), []
    for adapter in ("policy", None):
        with policy.adapter_active(adapter):
            hidden = policy.read(prefixes, said)
            decoder = policy.decoder(policy.prefill(prefixes), GROUP, LENGTH)
            steps.append(decoder.step(said.tokens[:, 0]))
            assert (steps[-1] - hidden[:, 1]).abs().max() < 2e-5
    assert (steps[0] - steps[1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_small_adapter_stays_beside_half_precision_weights(nano_weights):
    """Merging into bfloat16 weights would round most of it away, so that the base model would be sampled."""
    policy, prefixes = adapted(nano_weights("qwen3_vl"), "bfloat16", 1e-4)
    product = policy.decoder(policy.prefill(prefixes), GROUP, LENGTH).layers[0].qkv
    layer = policy.model.model.language_model.layers[0].self_attn.q_proj
    base, change = layer.get_base_layer().weight, layer.get_delta_weight("policy")
    assert base.dtype == product.weight.dtype == torch.bfloat16
    assert torch.equal(product.weight[: len(base)], base)
    narrow, wide = product.weight[product.size : product.size + 4], product.wide[:4, : len(base)]
    torch.testing.assert_close(wide.float().t() @ narrow.float(), change.float(), rtol=0.03, atol=1e-6)
    assert not product.wide[:4, len(base) :].any() and not product.wide[4:, : len(base)].any()
    merged = (base + change.to(base.dtype)) != base
    assert merged.float().mean() < 0.5  # what merging would have lost


class Pretended(TorchDispatchMode):
    """Stands for a CUDA graph on a CPU: records operations with their tensors.

    A launch repeats them on these tensors and runs no line of Python again.
    """

    def __init__(self, work, spoilt):
        super().__init__()
        self.done, self.spoilt = [], spoilt
        with self:
            self.result = work()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        left = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, left))
        return left

    def replay(self):
        for function, args, kwargs, left in self.done:
            for place, result in zip(tree_leaves(left), tree_leaves(function(*args, **kwargs)), strict=True):
                if place.data_ptr() != result.data_ptr():  # neither a view nor written in place
                    place.copy_(result)
        self.result += self.spoilt


class PretendedRecorder(GraphRecorder):
    launched, recorded, spoilt = 0, 0, 0.0

    def _recorded(self, work):
        type(self).recorded += 1
        graph = Pretended(work, self.spoilt)
        return graph, graph.result

    def call(self, function, tokens, size):
        before = self.recorded
        hidden = super().call(function, tokens, size)
        type(self).launched += before == self.recorded
        return hidden


def recording(monkeypatch, required=False):
    """Let sampling record its steps as on a GPU, with a pretended recorder; return the recorder."""
    recorder = PretendedRecorder(required)
    monkeypatch.setattr(shared_prefix, "_STRIDE", 8)
    monkeypatch.setattr(
        SharedPrefixEngine, "_recorder_on", lambda self, _: None if recorder.gave_up else recorder
    )
    return recorder


def test_what_is_recorded_samples_the_same(policy, prefixes, monkeypatch):
    """Stop tokens are so frequent that rows leave: buffers are replaced, and steps are recorded anew."""
    monkeypatch.setitem(policy._buffers, "stop_ids", torch.arange(0, 400, 6))
    plain = SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16))
    monkeypatch.setattr(PretendedRecorder, "recorded", 0)
    monkeypatch.setattr(PretendedRecorder, "launched", 0)
    recording(monkeypatch)
    assert torch.equal(SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16)).tokens, plain.tokens)
    assert PretendedRecorder.recorded > 3 and PretendedRecorder.launched > 8


def test_what_is_recorded_would_not_follow_a_tensor_to_another_place(policy, prefixes, monkeypatch):
    """Negative control: with a new tensor for the place at each step, a launch samples something else."""
    made = Decoder.step

    def step(self, tokens):
        hidden, self.at = made(self, tokens), self.at.clone()
        return hidden

    monkeypatch.setattr(Decoder, "step", step)
    computed = SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16))
    recording(monkeypatch)
    launched = SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16))
    assert torch.equal(launched.tokens[:, :2], computed.tokens[:, :2])
    assert launched.texts != computed.texts


FAILURES = {
    "cannot be recorded": RuntimeError("operation not permitted when stream is capturing\nand so on"),
    "no memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand so on"),
}


@pytest.fixture(params=[*FAILURES, "does not repeat", "no number"])
def failing(request, monkeypatch):
    """Stands for a GPU on which recording fails, in several ways."""

    def fail(recorder, work):
        raise FAILURES[request.param]

    if request.param in FAILURES:
        monkeypatch.setattr(PretendedRecorder, "_recorded", fail)
    else:
        spoilt = float("nan") if request.param == "no number" else 0.5
        monkeypatch.setattr(PretendedRecorder, "spoilt", spoilt)
    return request.param


def test_where_recording_fails_sampling_goes_on_without_and_says_so_once(
    policy, prefixes, monkeypatch, failing
):
    plain = SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16))
    recorder = recording(monkeypatch)
    said = {
        "cannot be recorded": "capturing",
        "no memory": "memory ran out",
        "does not repeat": "not repeat",
        "no number": "not repeat",
    }
    with pytest.warns(UserWarning, match=f"rollout.graphs: .*without.*{said[failing]}") as warned:
        for _ in range(2):
            sampled = SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16))
            assert torch.equal(sampled.tokens, plain.tokens)
    assert len(warned) == 1 and recorder.gave_up and recorder.graph is None


def test_where_graphs_are_required_failing_names_the_key_and_memory_is_memory(
    policy, prefixes, monkeypatch, failing
):
    recording(monkeypatch, required=True)
    kind, said = {
        "cannot be recorded": (ValueError, r"rollout.graphs: must be auto or false .*capturing\)$"),
        "no memory": (torch.OutOfMemoryError, "Tried to allocate"),
        "does not repeat": (ValueError, "rollout.graphs: must be .*does not repeat"),
        "no number": (ValueError, "rollout.graphs: must be .*does not repeat"),
    }[failing]
    with pytest.raises(kind, match=said):
        SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16))


def test_a_rollout_that_is_broken_off_leaves_no_recording_behind(policy, prefixes, monkeypatch):
    """The next rollout has new buffers of the same shapes; launched on the old ones it would give other
    tokens.
    """
    engine, plain = SharedPrefixEngine(24), SharedPrefixEngine(24).sample(policy, prefixes, 8, range(16, 32))
    recorder = recording(monkeypatch)
    monkeypatch.setattr(engine, "recorder", recorder)
    drawn, places = shared_prefix.sample_tokens, []

    def interrupted(probabilities, noise):
        places.append(1)
        if len(places) == 5:
            raise KeyboardInterrupt
        return drawn(probabilities, noise)

    monkeypatch.setattr(shared_prefix, "sample_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.sample(policy, prefixes, 8, range(16))
    assert recorder.graph is not None
    assert torch.equal(engine.sample(policy, prefixes, 8, range(16, 32)).tokens, plain.tokens)
