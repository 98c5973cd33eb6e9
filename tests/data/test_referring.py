"""The RefCOCO family, and chat traces."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from layouts import coco, ref
from PIL import Image
from torch.utils.data import DataLoader

from segrl.data.annotations import read_refs, read_segmentation
from segrl.data.chat_traces import AsWritten, ChatTraces
from segrl.data.referring import ReferringExpressions, belongs
from segrl.data.traces import Annotator
from segrl.prompts.tags import SegR1Tags
from segrl.types import Sample


def test_the_fixture_of_the_refer_layout_reads_right(realdata):
    root = realdata / "refcoco_style"
    found = ReferringExpressions(
        str(root / "refcoco"), str(root / "images/train2014"), "refs(unc).p", "val", None, 0, None
    )
    refs = read_refs(root / "refcoco/refs(unc).p")
    assert len(found) == sum(len(r["sentences"]) for r in refs if r["split"] == "val")
    first = found[0]
    assert first.query == "cat on the left" and first.mask.shape == first.image.shape[:2] == (480, 640)
    assert int(first.mask.sum()) == 53306  # pycocotools' own area of this object
    assert len(set(found.ids)) == len(found) and found.ids[0] == first.id


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_would_call_code_is_refused(tmp_path):
    for content in (Evil(), [{"sentences": np.zeros(1)}]):
        (tmp_path / "refs(x).p").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=r"refs\(x\)\.p: a file of plain data is needed"):
            read_refs(tmp_path / "refs(x).p")
    for content in (b"", b"no pickle at all", pickle.dumps([{"sentences": []}])[:-3]):
        (tmp_path / "refs(x).p").write_bytes(content)
        with pytest.raises(ValueError, match="plain data"):
            read_refs(tmp_path / "refs(x).p")
    (tmp_path / "refs(x).p").write_bytes(pickle.dumps({"not": "a list"}))
    with pytest.raises(ValueError, match="list of refs"):
        read_refs(tmp_path / "refs(x).p")
    with pytest.raises(ValueError, match="there is no"):
        read_refs(tmp_path / "nowhere.p")


def test_overlapping_polygons_and_run_lengths_are_a_union():
    square, other = [2, 2, 6, 2, 6, 6, 2, 6], [4, 4, 8, 4, 8, 8, 4, 8]
    both = read_segmentation([square, other], 10, 10)
    assert both.dtype == bool and both[3, 3] and both[5, 5] and both[7, 7] and not both[1, 1]
    assert (both == (read_segmentation([square], 10, 10) | read_segmentation([other], 10, 10))).all()
    runs = {"counts": [13, 2, 85], "size": [10, 10]}  # columns first
    assert np.argwhere(read_segmentation(runs, 10, 10)).tolist() == [[3, 1], [4, 1]]


def test_a_draw_takes_so_many_objects_with_one_sentence_each_by_its_seed(realdata):
    root = realdata / "refcoco_style"

    def ids(seed):
        return ReferringExpressions(
            str(root / "refcoco"), str(root / "images/train2014"), "refs(unc).p", "val", 3, seed, None
        ).ids

    assert ids(1) == ids(1) and len({one.split("-")[0] for one in ids(1)}) == 3
    assert any(ids(1) != ids(seed) for seed in range(2, 9))
    with pytest.raises(ValueError, match="99 objects of the split val"):
        ReferringExpressions(
            str(root / "refcoco"), str(root / "images/train2014"), "refs(unc).p", "val", 99, 0, None
        )


@pytest.mark.parametrize(
    ("ref_split", "of"),
    [
        ("testA", {"testA", "test"}),
        ("testB", {"testB", "test"}),
        ("testAB", {"testA", "testB", "testAB", "test"}),
        ("testBC", {"testB", "testC", "testBC", "test"}),
        ("test", {"test"}),
        ("train", {"train"}),
        ("val", {"val"}),
    ],
)
def test_a_ref_is_of_a_split_as_the_refer_api_has_it(ref_split, of):
    splits = {"train", "val", "test", "testA", "testB", "testC", "testAB", "testBC"}
    assert {split for split in splits if belongs(ref_split, split)} == of


def refer(tmp_path, *refs, name="refs(unc).p", split="val"):
    coco(tmp_path, "images", "refcoco", name, list(refs))
    return ReferringExpressions(
        str(tmp_path / "refcoco"), str(tmp_path / "images"), name, split, None, 0, None
    )


def test_every_sentence_of_a_split_is_a_sample_stripped_and_in_lower_case(tmp_path):
    found = refer(
        tmp_path, ref(1, "val", 11, (" The LEFT ", "left")), ref(2, "testA", 12, ("top",)), ref(3, "val", 12, ("top",)),
    )  # fmt: skip
    assert [found[i].query for i in range(3)] == ["the left", "left", "top"]
    assert found.ids == ["1-10", "1-11", "3-30"]
    assert [int(found[i].mask.sum()) for i in range(3)] == [192, 192, 192]


def test_grefcoco_names_one_object_several_or_none_and_refs_without_a_sentence_are_skipped(tmp_path):
    found = refer(
        tmp_path, ref(1, "val", [11], ("left",)), ref(2, "val", [11, 12], ("left and top",)), ref(3, "val", [-1], ("a cow",)),
        ref(4, "val", -1, ("a dog",)), ref(5, "val", [11], ()), name="grefs(unc).json",
    )  # fmt: skip
    assert len(found) == 4
    assert [int(found[i].mask.sum()) for i in range(4)] == [192, 288, 0, 0]
    assert [len(found[i].objects) for i in range(4)] == [1, 2, 0, 0]
    assert (found[1].objects.any(0) == found[1].mask).all()


@pytest.mark.parametrize(("splits", "ids"), [(["val", "testA"], ["1-10"]), (["val"], ["1-10", "2-20"])])
def test_images_that_another_split_tests_on_are_left_out(tmp_path, splits, ids):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([ref(3, "testA", 21, ("three",), image=2)]))
    own = [ref(1, "train", 11, ("one",)), ref(2, "train", 21, ("two",), image=2)]
    coco(tmp_path, "images", "refcocog", "refs(umd).p", own)
    found = ReferringExpressions(
        str(tmp_path / "refcocog"), str(tmp_path / "images"), "refs(umd).p", "train", None, 0, None,
        exclude=[{"refs": str(other), "splits": splits}],
    )  # fmt: skip
    assert found.ids == ids


def test_refs_that_point_to_nothing_are_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="ref 1 names object 99, not in instances.json"):
        refer(tmp_path, ref(1, "val", 99, ("x",)))
    with pytest.raises(ValueError, match="ref 1 is of image 9, not in instances.json"):
        refer(tmp_path, ref(1, "val", 11, ("x",), image=9))


def test_images_that_are_not_there_are_named_before_training(tmp_path):
    refer(tmp_path, ref(1, "val", 11, ("x",)), ref(2, "val", 21, ("y",), image=2))
    (tmp_path / "images" / "COCO_train2014_000000000002.jpg").unlink()
    arguments = (str(tmp_path / "refcoco"), str(tmp_path / "images"), "refs(unc).p", "val", None, 0, None)
    with pytest.raises(ValueError, match="there is none for COCO_train2014_000000000002.jpg"):
        ReferringExpressions(*arguments)
    found = ReferringExpressions.survey(*arguments)
    assert [p.id for p in found.pieces] == ["1-10"] and len(found.without_image) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"annotations": []}'])
def test_instances_that_are_not_cocos_are_named(tmp_path, content):
    refer(tmp_path, ref(1, "val", 11, ("x",)))
    (tmp_path / "refcoco" / "instances.json").write_text(content)
    with pytest.raises(ValueError, match=r"instances\.json: COCO's annotations are needed"):
        ReferringExpressions(
            str(tmp_path / "refcoco"), str(tmp_path / "images"), "refs(unc).p", "val", None, 0, None
        )


def test_os_system_is_never_run(tmp_path):
    mark = tmp_path / "was_here"

    class Worse:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([{"sentences": [Worse()]}], protocol=2))
    with pytest.raises(ValueError, match="it names posix.system"):
        read_refs(tmp_path / "refs(unc).p")
    assert not mark.exists()


GRAMMAR = SegR1Tags(4, 8)


def shards(tmp_path, *rows, group=2):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "FCoT" / "data"
    folder.mkdir(parents=True)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet", row_group_size=group)
    return str(tmp_path / "FCoT")


def stored(shade, **other):
    file = io.BytesIO()
    Image.fromarray(np.full((40, 80, 3), shade, np.uint8)).save(file, "PNG")
    return {**GOOD, "image": {"bytes": file.getvalue(), "path": f"{shade}.png"}, **other}


def test_fcot_is_read_from_its_shards_as_downloaded(tmp_path):
    found = ChatTraces(shards(tmp_path, *(stored(10 * i) for i in range(5))), GRAMMAR, None)
    assert len(found) == 5 and len(set(found.ids)) == 5
    for i in (4, 0, 3, 1, 2):
        sample = found[i]
        assert (
            (sample.image == 10 * i).all() and sample.image.shape == (40, 80, 3) and sample.id == found.ids[i]
        )
        np.testing.assert_allclose(sample.trace.prompt.boxes, [[0.1, 0.1, 0.5, 0.5]], atol=1e-6)
    assert ChatTraces(str(tmp_path / "FCoT"), GRAMMAR, 16)[0].image.shape == (16, 16, 3)


def test_loader_workers_read_shards_too(tmp_path):
    found = ChatTraces(shards(tmp_path, *(stored(10 * i) for i in range(5))), GRAMMAR, None)
    loaded = DataLoader(found, batch_size=None, num_workers=2)
    assert [int(sample.image[0, 0, 0]) for sample in loaded] == [0, 10, 20, 30, 40]


def test_a_shard_that_is_no_trace_is_named(tmp_path):
    path = shards(tmp_path, stored(1), stored(2, solution="nonsense"))
    with pytest.raises(
        ValueError, match=r"train-00000-of-00001\.parquet, row 1: a solution that the grammar"
    ):
        ChatTraces(path, GRAMMAR, None)[1]
    (tmp_path / "FCoT" / "data" / "train-00001-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(
        ValueError, match=r"train-00001-of-00001\.parquet: a parquet shard of traces is needed"
    ):
        ChatTraces(path, GRAMMAR, None)
    other = tmp_path / "other"
    with pytest.raises(ValueError, match="there is no solution"):
        ChatTraces(shards(other, {"image": "x", "thinking": "t", "problem": "p"}), GRAMMAR, None)
    for nothing in (tmp_path / "nowhere", tmp_path / "other" / "empty"):
        (other / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"data\.traces: a \.jsonl or parquet shards"):
            ChatTraces(str(nothing), GRAMMAR, None)


def traces(tmp_path, *lines):
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "t.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return ChatTraces(str(tmp_path / "t.jsonl"), GRAMMAR, None)


GOOD = {
    "image": "a.png", "problem": "?", "thinking": "left", "solution": "<bbox>[8,4,40,20]</bbox>, <points>[[20,10]]</points>, <labels>[1]</labels>",
}  # fmt: skip


def test_a_trace_is_read_in_pixels_of_its_image(tmp_path):
    sample = traces(tmp_path, GOOD)[0]
    np.testing.assert_allclose(sample.trace.prompt.boxes, [[0.1, 0.1, 0.5, 0.5]], atol=1e-6)
    assert sample.trace.thought == "left" and not sample.mask.any()
    assert AsWritten()(sample, np.random.default_rng(0)) is sample.trace


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: JSON is needed"),
        ({"image": "a.png", "thinking": "x"}, "line 2: solution: field required"),
        ({**GOOD, "solution": 3}, "line 2: solution"),
    ],
)
def test_a_line_that_is_no_trace_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        traces(tmp_path, GOOD, line)


def test_a_solution_that_is_no_sentence_is_named_with_its_line(tmp_path):
    found = traces(tmp_path, GOOD, {**GOOD, "solution": "<bbox>[8,4,40,20]</bbox>"})
    with pytest.raises(ValueError, match="line 2: a solution that the grammar reads"):
        found[1]


def test_a_sample_without_a_trace_or_an_object_cannot_be_imitated():
    blank = Sample(id="blank", image=np.zeros((8, 8, 3), np.uint8), mask=np.zeros((8, 8), bool))
    with pytest.raises(ValueError, match="blank: a sample with a trace is needed"):
        AsWritten()(blank, np.random.default_rng(0))
    with pytest.raises(ValueError, match="blank: an object is needed"):
        Annotator(0.0, 100, 4)(blank, np.random.default_rng(0))
