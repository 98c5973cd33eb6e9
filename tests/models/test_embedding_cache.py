"""Every image is encoded once: in a batch, in memory, on the disk, and while the policy decodes."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from segrl.data.synthetic import SyntheticScenes
from segrl.models.sam2_head import Sam2Head
from segrl.runs.configuration import asset
from segrl.types import MaskPrompt

SCENES = SyntheticScenes("test", 4, 0, 128, (0.2, 1.0), (1, 1))
IMAGES = [SCENES[i].image for i in range(4)]
PROMPTS = [[MaskPrompt.of([[0.2, 0.2, 0.9, 0.8]]), MaskPrompt.of([], [[0.5, 0.5]], [1])]] * 4


def head_of(kept=8, folder=None, checkpoint="sam2_nano.safetensors", precision="float32"):
    where = None if folder is None else str(folder)
    head = Sam2Head(asset("sam2_nano.yaml"), asset(checkpoint), 256, kept, where, precision)
    head.encoded = []
    embed = head.embed
    head.embed = lambda pixels: head.encoded.append(len(pixels)) or embed(pixels)
    return head


def same(one, other):
    return all((a == b).all() for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.fixture(scope="module")
def plain():
    return head_of(kept=0).segment(IMAGES, PROMPTS)


def test_an_image_that_is_there_twice_is_encoded_once(plain):
    head = head_of()
    twice = head.segment([IMAGES[0], IMAGES[1], IMAGES[0]], PROMPTS[:3])
    assert head.encoded == [2]
    assert same(twice, [plain[0], plain[1], plain[0]])


def test_the_latest_are_remembered_and_the_oldest_forgotten(plain):
    head = head_of(kept=2)
    for i in (0, 1, 0, 2, 0, 1):
        assert same(head.segment([IMAGES[i]], PROMPTS[:1]), [plain[i]])
    assert head.encoded == [1, 1, 1, 1]  # 0, 1, 2, and 1 again


def test_what_is_asked_for_while_the_policy_decodes_is_not_encoded_again(plain):
    head, threads = head_of(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        head.prepare(IMAGES)
        assert head.ahead is not None
        assert same(head.segment(IMAGES, PROMPTS), plain)
    finally:
        torch.set_num_threads(threads)
    assert head.encoded == [4]


def test_a_fault_in_the_thread_is_raised_where_it_is_waited_for():
    head, threads = head_of(), torch.get_num_threads()
    head.embed = lambda pixels: 1 / 0
    torch.set_num_threads(2)
    try:
        head.prepare(IMAGES)
        with pytest.raises(ZeroDivisionError):
            head.segment(IMAGES, PROMPTS)
    finally:
        torch.set_num_threads(threads)


def test_another_run_finds_embeddings_on_the_disk(plain, tmp_path):
    head_of(folder=tmp_path).segment(IMAGES[:3], PROMPTS[:3])
    again = head_of(folder=tmp_path)
    assert same(again.segment(IMAGES, PROMPTS), plain)
    assert again.encoded == [1]


def test_other_weights_or_another_precision_find_nothing(tmp_path):
    head_of(folder=tmp_path).segment(IMAGES, PROMPTS)
    half = head_of(folder=tmp_path, precision="bfloat16")
    half.segment(IMAGES, PROMPTS)
    other = head_of(folder=tmp_path)
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.001)
    other.segment(IMAGES, PROMPTS)
    assert half.encoded == other.encoded == [4]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_the_precision_is_the_heads_own_whatever_surrounds_it(plain, threads, tmp_path):
    """Under the policy's bfloat16 autocast, masks, embeddings and their folder are those of float32."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # with 2 the encoder has a thread of its own
    try:
        for folder in (None, tmp_path):
            head = head_of(folder=folder)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                head.prepare(IMAGES)
                assert same(head.segment(IMAGES, PROMPTS), plain)
                assert {level.dtype for one in head.embeddings.latest.values() for level in one} == {
                    torch.float32
                }
        assert [folder.name.rpartition("-")[2] for folder in tmp_path.iterdir()] == ["float32"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = head.embed(head.preprocess(IMAGES[:1]))
            assert {out.dtype for out in head.decode_all(features, [PROMPTS[0][0]])} == {torch.float32}
    finally:
        torch.set_num_threads(before)


def test_bfloat16_is_a_key_and_no_autocast_is_needed_for_it(plain):
    half = head_of(precision="bfloat16").segment(IMAGES, PROMPTS)
    assert not same(half, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(head_of(precision="bfloat16").segment(IMAGES, PROMPTS), half)
    with pytest.raises(ValueError, match=r"head\.precision: must be one of float32, bfloat16; got float16"):
        head_of(precision="float16")


def test_a_damaged_file_is_made_again(plain, tmp_path):
    head_of(folder=tmp_path).segment(IMAGES, PROMPTS)
    (file, *_) = sorted(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    again = head_of(folder=tmp_path)
    assert same(again.segment(IMAGES, PROMPTS), plain) and again.encoded == [1]
    last = head_of(folder=tmp_path)
    last.segment(IMAGES, PROMPTS)
    assert last.encoded == []


def test_ranks_share_a_folder(plain, tmp_path):
    """Two processes write the same files at once, and a third reads them."""
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from test_embedding_cache import IMAGES, PROMPTS, head_of; "
        "[head_of(kept=0, folder=sys.argv[1]).segment(IMAGES, PROMPTS) for _ in range(2)]"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(np.__file__), __file__.rpartition("/")[0]]
    for process in [subprocess.Popen(command) for _ in range(2)]:
        assert process.wait(timeout=120) == 0
    reader = head_of(folder=tmp_path)
    assert same(reader.segment(IMAGES, PROMPTS), plain) and reader.encoded == []
    assert not list(tmp_path.rglob("*.partial"))


def test_other_weights_in_the_same_head_forget_what_the_old_ones_made(tmp_path):
    for folder in (None, tmp_path):
        head = head_of(folder=folder)
        head.segment(IMAGES, PROMPTS)
        changed = {
            name: value * 1.5 if value.is_floating_point() else value
            for name, value in head.state_dict().items()
        }
        head.load_state_dict(changed)
        fresh = head_of(kept=0)
        fresh.load_state_dict(changed)
        assert same(head.segment(IMAGES, PROMPTS), fresh.segment(IMAGES, PROMPTS))
        assert head.encoded == [4, 4]


def test_no_more_embeddings_are_kept_than_configured():
    head = head_of(kept=1)
    head.segment(IMAGES, PROMPTS)
    (embedding,) = head.embeddings.latest.values()
    assert all(level.untyped_storage().nbytes() == level.nbytes for level in embedding)


def test_a_folder_that_cannot_be_written_ends_no_run(plain, tmp_path):
    (tmp_path / "file").write_text("")
    head = head_of(folder=tmp_path / "file")
    with pytest.warns(UserWarning, match=r"head\.embeddings_folder"):
        assert same(head.segment(IMAGES, PROMPTS), plain)


def test_a_negative_number_of_kept_embeddings_is_refused():
    with pytest.raises(ValueError, match=r"head\.embeddings_kept"):
        head_of(kept=-1)
