"""What can be seen of a GPU without one, on torch's FakeTensor: shapes, devices and bytes."""

import copy
import dataclasses
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from segrl.models import sam2_head
from segrl.models.hf_vlm import HFPolicy
from segrl.models.kernels import pinned, token_logprobs, vision_tower, window_attention
from segrl.models.kernels.decoder import Decoder, PackedLinear
from segrl.models.kernels.prefix_pass import read_prefixes, read_suffixes
from segrl.models.kernels.suffix_attention import VarlenSuffixes, shares_keys
from segrl.rollout.shared_prefix import SharedPrefixEngine

GROUP, LENGTH = 3, 20
# torch 2.11 raises a RuntimeError without a name of its own.
DeviceMismatch = getattr(fake_tensor, "FakeTensorDeviceMismatchError", RuntimeError)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def moved(thing):
    """Return the same on a pretended GPU.

    Tensors of other devices may not be mixed with it, and it has no contents to wait for.
    """
    if isinstance(thing, Tensor):
        return torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device="cuda")
    if isinstance(thing, (tuple, list)):
        return type(thing)(map(moved, thing))
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
        return dataclasses.replace(thing, **{name: moved(getattr(thing, name)) for name in names})
    if isinstance(thing, (Decoder, PackedLinear, VarlenSuffixes)):
        vars(thing).update({name: moved(value) for name, value in vars(thing).items()})
    return thing


class Written(TorchDispatchMode):
    """Records the operations, with shapes and numbers."""

    def __init__(self):
        super().__init__()
        self.down = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        told = tree_map_only(Tensor, lambda t: (tuple(t.shape), t.dtype), (args, kwargs))
        self.down.append(f"{function}{told}")
        return function(*args, **(kwargs or {}))


class Launched(TorchDispatchMode):
    """Records the operations that launch a kernel; views do not."""

    def __init__(self):
        super().__init__()
        self.down = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view and "_unsafe_view" not in str(function):
            self.down.append(str(function))
        return result


@pytest.fixture
def step(policy, prefixes):
    """Return the operations that are recorded in half precision on a pretended GPU, at a place in the
    completions.
    """
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder = policy.decoder(policy.prefill(prefixes), GROUP, LENGTH, stride=LENGTH)
    with FakeTensorMode(), torch.no_grad():
        moved(decoder)
        tokens = torch.empty(len(prefixes) * GROUP, dtype=torch.long, device="cuda")

        def at(place):
            decoder.place = place
            with half_precision_on_a_gpu():
                return decoder.step(tokens)

        yield decoder, at


def test_a_step_touches_its_device_alone_and_waits_for_nothing(step):
    """Another device or a wait would make a CUDA graph impossible."""
    decoder, at = step
    hidden = at(2)
    assert hidden.device.type == "cuda"
    assert hidden.shape == (decoder.groups * GROUP, decoder.embedding.shape[1])


def test_a_step_is_the_same_at_every_place(step):
    """A step recorded at one place is launched at others: nothing but contents may differ."""
    decoder, at = step
    written = []
    for place in (2, 3, 17):
        with Written() as operations:
            at(place)
        written.append(operations.down)
    assert len(written[0]) > 20 * len(decoder.layers)
    assert written[0] == written[1] == written[2]


def test_a_step_launches_few_kernels(step):
    """At a few microseconds each, launches delay a token as reading the weights does. One `masked_fill` hides
    padding and later places at once.
    """
    decoder, at = step
    with Launched() as launched:
        at(2)
    layers = len(decoder.layers)
    norms = 3 * (decoder.layers[0].norms is not None)  # of queries, of keys, and to put them together
    assert len(launched.down) <= (26 + norms) * layers + 16


def test_a_step_that_is_not_made_for_recording_differs_from_place_to_place(step):
    decoder, at = step
    decoder.stride = None
    written = []
    for place in (2, 3):
        with Written() as operations:
            at(place)
        written.append(operations.down)
    assert written[0] != written[1]


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda at: int(at), DataDependentOutputException),
        (lambda at: at + torch.ones(3, device="cpu"), DeviceMismatch),
    ],
)
def test_waiting_and_another_device_would_be_seen(step, monkeypatch, fault, seen):
    decoder, at = step
    normed = Decoder._normed
    monkeypatch.setattr(
        Decoder, "_normed", lambda self, *given: fault(self.at) is None or normed(self, *given)
    )
    with pytest.raises(seen):
        at(2)


def test_sampling_waits_for_its_device_at_every_eighth_token_alone(step, policy, monkeypatch):
    """Sampling waits to see which rows have ended. Without contents nothing can be seen, and it ends at the
    first wait.
    """
    decoder, _ = step
    width, vocabulary = decoder.embedding.shape[1], len(decoder.embedding)
    decoder.place = 0
    taken = []
    monkeypatch.setattr(Decoder, "step", lambda self, tokens: taken.append(1) or self._read(tokens, LENGTH))
    hidden = torch.empty(decoder.groups, width, device="cuda")
    head = PackedLinear(torch.empty(vocabulary, width, device="cuda"), None)
    pretended = SimpleNamespace(
        device=hidden.device, pad_id=0, temperature=1.0, stop_ids=moved(policy.stop_ids),
        decoder=lambda *_: decoder, head=lambda: head,
        logits=lambda *given: HFPolicy.logits(pretended, *given),
    )  # fmt: skip
    prefixes = [SimpleNamespace(token_ids=hidden)] * decoder.groups
    state = SimpleNamespace(last_hidden=hidden)
    with pytest.raises(DataDependentOutputException):
        SharedPrefixEngine(LENGTH).sample(pretended, prefixes, GROUP, range(GROUP * decoder.groups), state)
    assert len(taken) == 7


class Sent(TorchDispatchMode):
    """Records copies to the device: whether each is out of pinned memory and asynchronous."""

    def __init__(self, pinned):
        super().__init__()
        self.pinned, self.copies = pinned, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device.type != result.device.type:
            assert (args[0].device.type, result.device.type) == ("cpu", "cuda")
            self.copies.append(
                bool(kwargs.get("non_blocking")) and any(args[0] is one for one in self.pinned)
            )
        return result


@pytest.mark.parametrize(
    ("sent", "waits"),
    [
        (pinned.sent, False),
        (lambda image, device: image.to(device, non_blocking=True), True),
        (lambda image, device: image.pin_memory().to(device), True),
    ],
    ids=["as it is", "not pinned", "waited for"],
)
def test_images_are_given_to_the_encoder_without_waiting_for_the_device(nano_head, monkeypatch, sent, waits):
    """The device encodes while the host begins to sample. A copy out of other memory would wait for all work
    before it.
    """
    held = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: held.append(self.clone()) or held[-1])
    monkeypatch.setattr(pinned, "_can_pin", lambda: True)
    monkeypatch.setattr(sam2_head, "sent", sent)
    head = copy.deepcopy(nano_head)
    images = [np.zeros((128, 128, 3), np.uint8), np.zeros((90, 60, 3), np.uint8)]
    monkeypatch.setattr(sam2_head, "_ENCODED", 1)
    with FakeTensorMode(), torch.no_grad():
        for module in head.modules():
            for part in (module._parameters, module._buffers):
                part.update({name: moved(value) for name, value in part.items()})
        with Sent(held) as seen:
            features = head._encoded(images)
    assert [level.device.type for level in features] == ["cuda"] * 3 and len(features[0]) == 2
    assert seen.copies == [not waits] * 2


def test_where_memory_cannot_be_pinned_copies_go_without_and_it_is_said_once(monkeypatch):
    def refused(self):
        raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")

    monkeypatch.setattr(Tensor, "pin_memory", refused)
    pinned._can_pin.cache_clear()
    with FakeTensorMode(), pytest.warns(UserWarning, match="pinned: CUDA error") as warned:
        for _ in range(2):
            assert pinned.sent(torch.zeros(3), torch.device("cuda")).device.type == "cuda"
    pinned._can_pin.cache_clear()
    assert len(warned) == 1


@contextmanager
def half_precision_on_a_gpu():
    """Stand for `torch.autocast`, which looks for a real GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("half", [True, False])
def test_the_head_may_round_to_tf32_beside_half_precision_alone(half, monkeypatch):
    """This holds for logits and log-probabilities; outside of them the setting is as before."""
    seen, plain = [], token_logprobs._logits
    monkeypatch.setattr(
        token_logprobs,
        "_logits",
        lambda *given: seen.append(torch.get_float32_matmul_precision()) or plain(*given),
    )

    def head(given):
        assert given.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
        seen.append(torch.get_float32_matmul_precision())
        return given @ weight.t()

    with FakeTensorMode(), half_precision_on_a_gpu() if half else nullcontext():
        weight, hidden = torch.empty(40, 6, device="cuda"), torch.empty(9, 6, device="cuda")
        never, tokens = (torch.empty(size, dtype=torch.long, device="cuda") for size in (2, 9))
        pretended = SimpleNamespace(temperature=1.0)
        HFPolicy.logits(pretended, hidden, head)
        token_logprobs.token_logprobs(hidden, weight, tokens, never, most=40 * 5)
    assert seen == ["high" if half else "highest"] * (1 + 2)
    assert torch.get_float32_matmul_precision() == "highest"


def test_completions_are_learned_from_in_one_call_of_the_kernel_per_layer(policy, prefixes, monkeypatch):
    """The pass runs on a pretended GPU, up to its backward pass. Each call is checked against the kernel's
    conditions.
    """
    real = torch.arange(9) < torch.tensor([9, 4, 1, 0, 6, 9])[:, None]
    with torch.no_grad():
        state = policy.prefill(prefixes)
    count, rows = int(real.sum()), int(real.any(1).sum())
    layout, calls = VarlenSuffixes(state.attention_mask, real, torch.bfloat16), []

    def kernel(query, key, value, query_ends, key_ends, most_queries, most_keys, **settings):
        for part in (query, key, value):
            assert part.dtype == torch.bfloat16 and part.device.type == "cuda" and part.stride(-1) == 1
        assert key.shape == value.shape and query.shape[::2] == (count, key.shape[2])
        assert (
            query.shape[1] % key.shape[1] == 0
            and {**shares_keys(varlen_attn), "window_size": (-1, 0)}.items() <= settings.items()
        )
        for ends in (query_ends, key_ends):
            assert ends.dtype == torch.int32 and ends.device.type == "cuda" and ends.is_contiguous()
            assert ends.shape == (rows + 1,)
        assert (most_queries, type(most_keys)) == (9, int)
        calls.append(1)
        return varlen_attn(query, key, value, query_ends, key_ends, most_queries, most_keys, **settings)

    monkeypatch.setattr("segrl.models.kernels.suffix_attention.varlen_attn", kernel)
    monkeypatch.setattr("segrl.models.kernels.prefix_pass.laid_out", lambda *_: layout)
    vlm = copy.deepcopy(policy.model.model)
    with FakeTensorMode(), half_precision_on_a_gpu():
        for module in vlm.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: moved(value) for name, value in held.items()})
        moved(layout)
        tokens = torch.empty(real.shape, dtype=torch.long, device="cuda")
        for weight in vlm.language_model.layers[0].mlp.parameters():
            weight.requires_grad_()
        hidden = read_suffixes(vlm, moved(state), tokens, moved(real), recompute=False)
        assert hidden.shape == (*real.shape, vlm.config.text_config.hidden_size)
        assert hidden.device.type == "cuda" and hidden.dtype == torch.float32 and hidden.requires_grad
    assert len(calls) == len(vlm.language_model.layers)


def test_prefixes_are_read_without_waiting_for_the_device(policy, prefixes, monkeypatch):
    """On a pretended GPU the tower's layout is made on the host, from grids that stay there."""
    grid = torch.cat([prefix.grid for prefix in prefixes])
    layout = vision_tower.tower_layout(policy.model.model.visual, grid, torch.device("cpu"))
    monkeypatch.setattr(pinned, "_can_pin", lambda: False)
    for module in (window_attention, vision_tower):
        monkeypatch.setattr(module, "kernel_serves", lambda *_: True)
    model = copy.deepcopy(policy.model.model)
    tokens = (grid.prod(-1) // model.visual.spatial_merge_unit).tolist()
    with FakeTensorMode(), half_precision_on_a_gpu(), torch.no_grad():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: moved(value) for name, value in held.items()})
        there = {name: moved(value) for name, value in layout.items()}
        monkeypatch.setattr(vision_tower, "tower_layout", lambda *_: there)
        monkeypatch.setattr(
            fake_tensor.FakeTensor, "tolist", lambda self: tokens
        )  # asked of the grids alone, to split features
        state = read_prefixes(model, [moved(p) for p in prefixes], 0, recompute=False)
    assert state.last_hidden.device.type == "cuda" and len(state.keys) == len(model.language_model.layers)
    assert state.attention_mask.shape[1] % 32 == 0


def test_the_ledger_counts_what_lives(monkeypatch):
    """Worked by hand: storages of 4,000 and 2,000 bytes, views, freed tensors, and what a backward pass
    keeps.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory

    ledger = memory.Ledger()
    with ledger:
        first = torch.zeros(1000)
        assert (ledger.now, ledger.peak) == (4000, 4000)
        view = first.view(10, 100).t()[3]
        second = first + 1
        assert (ledger.now, ledger.peak) == (8000, 8000)
        second.mul_(2)
        del second
        half = first.to(torch.bfloat16)
        assert (ledger.now, ledger.peak) == (6000, 8000)
        del first, half
        assert ledger.now == 4000  # the view keeps it
        del view
        assert ledger.now == 0
        weight = torch.zeros(1000, requires_grad=True)
        out = (weight * weight).exp()  # keeps its own result
        assert ledger.now == 8000
        loss = out.sum()
        del out
        assert ledger.now == 8004
        loss.backward()
        assert ledger.now == 4000 + 4000 + 4  # weight, gradient, loss


@pytest.mark.slow
@pytest.mark.counted
def test_bytes_without_contents_are_those_with_them():
    """`benchmarks/memory.py` counts policies of real size. A tiny one shows that nothing is missing without
    contents.
    """
    done = subprocess.run(
        [sys.executable, "memory.py", "--check"], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
