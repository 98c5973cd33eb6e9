from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from segrl.data import collate
from segrl.data.annotator import Annotator
from segrl.data.collate import Collate, EvalShard
from segrl.data.datamodule import SegDataModule
from segrl.data.synthetic import SyntheticScenes
from segrl.prompts.frames import absolute_pixels
from segrl.prompts.tags import SegR1Tags
from segrl.protocols import Message
from segrl.types import Prefix, Sample


class ResumableShuffle(collate.ResumableShuffle):
    """In batches of one, at the beginning of a given epoch."""

    def __init__(self, length: int, seed: int, rank: int, ranks: int) -> None:
        super().__init__(length, 1, seed, rank, ranks, lambda: self.epoch * len(self))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


STOP = 0
GRAMMAR = SegR1Tags(max_boxes=4, max_points=4)


class Letters:
    """An encoder whose tokens are code points and whose frame is the image's own size."""

    def encode(self, messages: Sequence[Message], image: np.ndarray) -> Prefix:
        asked = messages[-1]["content"][-1]["text"]
        ids = torch.tensor([ord(letter) for letter in asked])
        return Prefix(
            token_ids=ids, token_types=torch.zeros_like(ids), pixels=torch.from_numpy(image.reshape(-1, 3).copy()).float(),
            positions=ids.expand(3, -1), grid=torch.tensor([[1, *image.shape[:2]]]), frame=absolute_pixels(*image.shape[:2]),
        )  # fmt: skip

    def answer(self, text: str) -> Tensor:
        return torch.tensor([*(ord(letter) for letter in text), STOP])

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        raise AssertionError("nothing is decoded here")


def text(tokens: Tensor) -> str:
    assert tokens[-1] == STOP
    return "".join(map(chr, tokens[:-1].tolist()))


def sample(name: str, query: str | None = None, side: int = 80) -> Sample:
    mask = np.zeros((side, side // 2), bool)
    mask[side // 4 : side // 2, side // 8 : side // 4] = True
    return Sample(id=name, image=np.full((*mask.shape, 3), len(name), np.uint8), mask=mask, query=query)


def answers(collate: Collate, *names: str) -> dict[str, str]:
    batch = collate([sample(name) for name in names])
    return {s.id: text(a) for s, a in zip(batch.samples, batch.answers, strict=True)}


# --- collate


def test_each_prefix_is_that_of_its_own_sample_and_query() -> None:
    samples = [sample("a", "the fish", side=8), sample("bb", None, side=16)]
    batch = Collate(Letters(), GRAMMAR)(samples)
    assert batch.answers is None
    assert batch.samples == samples
    asked = ["".join(map(chr, p.token_ids.tolist())) for p in batch.prefixes]
    assert asked[0] == "Identify and segment the fish."
    assert "all the primary objects" in asked[1]
    assert [p.grid.tolist() for p in batch.prefixes] == [[[1, 8, 4]], [[1, 16, 8]]]
    assert [p.pixels.unique().tolist() for p in batch.prefixes] == [[1.0], [2.0]]


@pytest.mark.parametrize(("encoder", "grammar"), [(None, GRAMMAR), (Letters(), None), (None, None)])
def test_without_a_policy_there_are_samples_and_no_prefixes(
    encoder: Letters | None, grammar: SegR1Tags | None
) -> None:
    batch = Collate(encoder, grammar, Annotator(0.0, 1000, 4))([sample("a"), sample("b")])
    assert [s.id for s in batch.samples] == ["a", "b"]
    assert (batch.prefixes, batch.answers) == ([], None)
    assert len(batch) == 2


def test_an_answer_is_the_trace_in_the_frame_of_the_policy_and_ends_in_the_stop_token() -> None:
    # rows 20..39 of 80, columns 10..19 of 40
    written = answers(Collate(Letters(), GRAMMAR, Annotator(0.0, 1000, 4)), "a")["a"]
    assert "<bbox>[10,20,20,40]</bbox>" in written
    assert GRAMMAR.parse(written, absolute_pixels(80, 40)).fault is None


def test_each_answer_is_in_the_frame_of_its_own_image() -> None:
    batch = Collate(Letters(), GRAMMAR, Annotator(0.0, 1000, 4))(
        [sample("a", side=80), sample("b", side=160)]
    )
    assert "<bbox>[10,20,20,40]</bbox>" in text(batch.answers[0])
    assert "<bbox>[20,40,40,80]</bbox>" in text(batch.answers[1])


def test_an_answer_depends_on_the_samples_id_alone_and_not_on_its_batch() -> None:
    loose = Annotator(0.9, 1000, 4)
    alone = answers(Collate(Letters(), GRAMMAR, loose), "fish")["fish"]
    last = answers(Collate(Letters(), GRAMMAR, loose), "crab", "ray", "fish")
    first = answers(Collate(Letters(), GRAMMAR, loose), "fish", "crab")
    assert alone == last["fish"] == first["fish"]
    assert len(set(last.values())) == 3, "equal masks, but every id loosens its box its own way"


def test_an_answer_does_not_follow_the_global_random_state() -> None:
    collate = Collate(Letters(), GRAMMAR, Annotator(0.9, 1000, 4))
    written = []
    for seed in range(2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        written.append(answers(collate, "fish")["fish"])
    assert written[0] == written[1]
    assert written[0] == answers(collate, "fish")["fish"]


def test_a_sample_without_an_object_is_refused_by_its_id() -> None:
    empty = Sample(id="COD10K-NonCAM-7", image=np.zeros((4, 4, 3), np.uint8), mask=np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="COD10K-NonCAM-7"):
        Collate(Letters(), GRAMMAR, Annotator(0.0, 1000, 4))([sample("a"), empty])


# --- orders


@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_one_rank_sees_every_index_once_in_another_order(length: int) -> None:
    order = list(ResumableShuffle(length, seed=0, rank=0, ranks=1))
    assert sorted(order) == list(range(length))
    assert len(ResumableShuffle(length, seed=0, rank=0, ranks=1)) == length
    assert length < 17 or order != list(range(length))


@pytest.mark.parametrize(("length", "ranks"), [(16, 2), (17, 2), (100, 8), (7, 3), (3, 4)])
def test_ranks_share_an_epoch_equally_and_never_an_index(length: int, ranks: int) -> None:
    shares = [ResumableShuffle(length, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    seen = [index for share in shares for index in share]
    assert (
        [len(list(share)) for share in shares]
        == [len(share) for share in shares]
        == [length // ranks] * ranks
    )
    assert len(set(seen)) == len(seen) == length // ranks * ranks
    assert set(seen) <= set(range(length))


def test_what_does_not_divide_is_left_for_another_epoch() -> None:
    shares = [ResumableShuffle(17, seed=0, rank=rank, ranks=4) for rank in range(4)]
    seen = set()
    for epoch in range(12):
        for share in shares:
            share.set_epoch(epoch)
            seen |= set(share)
    assert seen == set(range(17))


def test_the_order_is_a_function_of_seed_and_epoch_and_of_nothing_else() -> None:
    one, other = (ResumableShuffle(50, seed=7, rank=1, ranks=2) for _ in range(2))
    for sampler in (one, other):
        sampler.set_epoch(3)
    torch.manual_seed(1)
    third = list(one)
    torch.manual_seed(2)
    assert list(other) == third == list(one)
    other.set_epoch(4)
    assert list(other) != third
    other.set_epoch(3)
    assert list(other) == third, "a resumed run finds its order again"
    assert list(ResumableShuffle(50, seed=7, rank=1, ranks=2)) != third, "epoch 0"


def test_no_epoch_of_one_seed_is_an_epoch_of_the_next() -> None:
    orders = set()
    for seed in range(6):
        for epoch in range(6):
            sampler = ResumableShuffle(30, seed=seed, rank=0, ranks=1)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 36


def test_drawing_an_order_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    list(ResumableShuffle(50, seed=7, rank=0, ranks=1))
    assert torch.rand(3).tolist() == expected


@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (10, 1), (10, 3), (2, 4), (250, 8)])
def test_shares_of_an_evaluation_set_hold_each_index_once(length: int, ranks: int) -> None:
    shares = [EvalShard(length, rank, ranks) for rank in range(ranks)]
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert [len(list(share)) for share in shares] == [len(share) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_is_in_order() -> None:
    assert list(EvalShard(10, 1, 3)) == [1, 4, 7]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_wherever_it_stands_what_follows_is_what_would_have_followed(batch_size: int) -> None:
    """Epoch after epoch from the beginning, against a start at every batch."""
    done = 0

    def sampler(at: int) -> collate.ResumableShuffle:
        return collate.ResumableShuffle(17, batch_size, 4, 1, 2, lambda: at)

    per_epoch = len(sampler(0)) // batch_size
    whole = [index for epoch in range(3) for index in sampler(epoch * per_epoch)]
    for done in range(3 * per_epoch):
        rest = list(sampler(done))
        assert rest == whole[done * batch_size : (done // per_epoch + 1) * per_epoch * batch_size]
    assert len(sampler(0)) % batch_size == 0


def test_all_that_a_device_is_sent_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's loaders ask a batch for it; what is not pinned is copied while the host waits."""
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = Collate(Letters(), GRAMMAR, Annotator(0.0, 1000, 4))([sample("a"), sample("b")])
    same = batch.pin_memory()
    assert batch.answers is not None and same.answers is not None and same.samples == batch.samples
    before, after = (
        [getattr(p, name) for p in given.prefixes for name in ("token_ids", "token_types", "pixels", "positions")] + list(given.answers or [])
        for given in (batch, same)
    )  # fmt: skip
    assert sorted(map(id, after)) == sorted(map(id, pinned)) and len(pinned) == 10
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_loaders_pin_for_a_gpu_alone(device: str) -> None:
    scenes = SyntheticScenes("train", 8, 0, 64, (0.5, 1.0), (1, 1))
    data = SegDataModule(scenes, {"a": scenes}, {"b": scenes}, 2, 2, 0, 0)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1, global_step=0)  # type: ignore[assignment]
    loaders = [data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    assert [loader.pin_memory for loader in loaders] == [device == "cuda"] * 3


# --- refusals


class Refusing(Letters):
    """A processor that does not take an image, as Qwen's do one that is 300 times as long as wide."""

    def encode(self, messages: Sequence[Message], image: np.ndarray) -> Prefix:
        return torch.zeros(2).reshape(3)


def test_a_sample_that_the_processor_refuses_is_named() -> None:
    with pytest.raises(
        ValueError, match="crab: must be an image and a query that the policy's processor takes"
    ):
        Collate(Refusing(), GRAMMAR)([sample("crab")])


def test_a_batch_that_does_not_fill_is_refused_with_the_value_that_fits() -> None:
    scenes = SyntheticScenes("train", 6, 0, 56, (0, 1), (1, 2))
    with pytest.raises(
        ValueError, match=r"data\.batch_size: must be at most 6, .*got 16 \(set data\.batch_size=6\)"
    ):
        SegDataModule(scenes, {}, {}, 16, 4, 0, 0)
