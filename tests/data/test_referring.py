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
from segrl.data.annotator import Annotator, Judged, written
from segrl.data.chat_traces import AsWritten, ChatTraces
from segrl.data.check import check, look
from segrl.data.image_mask import ImageMaskFolders
from segrl.data.referring import ReferringExpressions, belongs
from segrl.prompts.frames import absolute_pixels
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
        with pytest.raises(ValueError, match=r"refs\(x\)\.p: must be a file of plain data"):
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
    with pytest.raises(ValueError, match="the split val must have at least 99 objects; it has"):
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
        tmp_path, ref(1, "val", 11, (" The LEFT ", "left")), ref(2, "testA", 12, ("top",)),
        ref(3, "val", 12, ("top",)),
    )  # fmt: skip
    assert [found[i].query for i in range(3)] == ["the left", "left", "top"]
    assert found.ids == ["1-10", "1-11", "3-30"]
    assert [int(found[i].mask.sum()) for i in range(3)] == [192, 192, 192]
    clusters = [found[i].cluster for i in range(3)]
    assert clusters == ["image 1"] * 3, "an image's sentences are drawn together"


def test_grefcoco_names_one_object_several_or_none_and_refs_without_a_sentence_are_skipped(tmp_path):
    found = refer(
        tmp_path, ref(1, "val", [11], ("left",)), ref(2, "val", [11, 12], ("left and top",)),
        ref(3, "val", [-1], ("a cow",)), ref(4, "val", -1, ("a dog",)), ref(5, "val", [11], ()),
        name="grefs(unc).json",
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
    with pytest.raises(ValueError, match="ref 1: object 99 must be in instances.json"):
        refer(tmp_path, ref(1, "val", 99, ("x",)))
    with pytest.raises(ValueError, match="ref 1: image 9 must be in instances.json"):
        refer(tmp_path, ref(1, "val", 11, ("x",), image=9))


def test_images_that_are_not_there_are_named_before_training(tmp_path):
    refer(tmp_path, ref(1, "val", 11, ("x",)), ref(2, "val", 21, ("y",), image=2))
    (tmp_path / "images" / "COCO_train2014_000000000002.jpg").unlink()
    arguments = (str(tmp_path / "refcoco"), str(tmp_path / "images"), "refs(unc).p", "val", None, 0, None)
    with pytest.raises(ValueError, match="there is none for COCO_train2014_000000000002.jpg"):
        ReferringExpressions(*arguments)
    found = ReferringExpressions.survey(*arguments)
    assert [item.id for item in found.items] == ["1-10"] and len(found.without_image) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"annotations": []}'])
def test_instances_that_are_not_cocos_are_named(tmp_path, content):
    refer(tmp_path, ref(1, "val", 11, ("x",)))
    (tmp_path / "refcoco" / "instances.json").write_text(content)
    with pytest.raises(ValueError, match=r"instances\.json: must hold COCO's annotations"):
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
        ValueError, match=r"train-00000-of-00001\.parquet, row 1: solution: must be one that the grammar"
    ):
        ChatTraces(path, GRAMMAR, None)[1]
    (tmp_path / "FCoT" / "data" / "train-00001-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train-00001-of-00001\.parquet: must be a parquet shard of traces"):
        ChatTraces(path, GRAMMAR, None)
    other = tmp_path / "other"
    with pytest.raises(ValueError, match="there is no solution"):
        ChatTraces(shards(other, {"image": "x", "thinking": "t", "problem": "p"}), GRAMMAR, None)
    for nothing in (tmp_path / "nowhere", tmp_path / "other" / "empty"):
        (other / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"data\.traces: must be a \.jsonl or parquet shards"):
            ChatTraces(str(nothing), GRAMMAR, None)


def traces(tmp_path, *lines):
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "t.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return ChatTraces(str(tmp_path / "t.jsonl"), GRAMMAR, None)


GOOD = {
    "image": "a.png", "problem": "?", "thinking": "left",
    "solution": "<bbox>[8,4,40,20]</bbox>, <points>[[20,10]]</points>, <labels>[1]</labels>",
}  # fmt: skip


def test_a_trace_is_read_in_pixels_of_its_image(tmp_path):
    sample = traces(tmp_path, GOOD)[0]
    np.testing.assert_allclose(sample.trace.prompt.boxes, [[0.1, 0.1, 0.5, 0.5]], atol=1e-6)
    assert sample.trace.thought == "left" and not sample.mask.any()
    assert AsWritten()(sample, np.random.default_rng(0)) is sample.trace


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: must be JSON"),
        ({"image": "a.png", "thinking": "x"}, "line 2: solution: must be given"),
        ({**GOOD, "solution": 3}, "line 2: solution"),
    ],
)
def test_a_line_that_is_no_trace_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        traces(tmp_path, GOOD, line)


def test_a_solution_that_is_no_sentence_is_named_with_its_line(tmp_path):
    found = traces(tmp_path, GOOD, {**GOOD, "solution": "<bbox>[8,4,40,20]</bbox>"})
    with pytest.raises(ValueError, match="line 2: solution: must be one that the grammar reads"):
        found[1]


@pytest.mark.parametrize("thinking", ["left", "<think>left</think>", " <think>\n left </think>\n"])
def test_a_thought_may_stand_in_its_tags_as_fcot_is_published(tmp_path, thinking):
    sample = traces(tmp_path, {**GOOD, "thinking": thinking})[0]
    assert sample.trace.thought == "left"
    frame = absolute_pixels(40, 80)
    assert GRAMMAR.render(sample.trace, frame) == f"<think> left </think> {GOOD['solution']}"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"thinking": "<think>a</think> and <think>b</think>"}, "thinking: must be one thought"),
        ({"thinking": "a </think> <bbox>[1,1,2,2]</bbox>"}, "thinking: must be one thought"),
        ({"solution": "nothing"}, "solution: must be one that the grammar reads"),
    ],
)
def test_check_and_training_refuse_the_same_rows_with_the_same_words(tmp_path, wrong, words):
    found = traces(tmp_path, GOOD, {**GOOD, **wrong})
    with pytest.raises(ValueError, match=rf"t\.jsonl, line 2: {words}") as refusal:
        found[1]
    items = ChatTraces.survey(str(tmp_path / "t.jsonl"), GRAMMAR, None).items
    assert [look(item).fault for item in items] == [None, str(refusal.value)]


class Mute(SegR1Tags):
    """A grammar that reads more than it can write."""

    def render(self, parsed, frame):
        raise ValueError("must be a mask prompt that can be written")


def test_a_trace_that_its_grammar_cannot_write_is_refused_with_its_row(tmp_path):
    traces(tmp_path, GOOD)
    found = ChatTraces(str(tmp_path / "t.jsonl"), Mute(16, 64), None)
    with pytest.raises(
        ValueError, match=r"t\.jsonl, line 1: must be a trace .* a mask prompt that can be written"
    ):
        found[0]


def test_thoughts_that_name_coordinates_are_counted(tmp_path):
    thoughts = ("left", "at (12, 48)", "box [3, 4.5, 9, 9]", "in 1999, (or so)", "two points: 3, 4")
    traces(tmp_path, *({**GOOD, "thinking": thought} for thought in thoughts))
    survey = ChatTraces.survey(str(tmp_path / "t.jsonl"), GRAMMAR, None)
    report = check({"train": survey}, {}, lambda line: None, 1)
    assert (report.splits[0].thoughts, report.splits[0].places) == (5, 2)
    assert any("thoughts          5, of which 2 name coordinates" in line for line in report.lines())


def test_traces_of_a_turned_photograph_are_in_the_frame_in_which_they_are_read_back(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = np.zeros((16, 24), np.uint8)
    mask[4:8, 6:12] = 255
    for folder, pixels, options in (
        ("i", np.zeros((16, 24, 3), np.uint8), {"exif": exif.tobytes()}),
        ("m", mask, {}),
    ):
        (tmp_path / folder).mkdir()
        pixels[0, 0] = 255  # the corner says how it is turned
        Image.fromarray(pixels).save(tmp_path / folder / "a.png", **options)
    mask[0, 0] = 0
    Image.fromarray(mask).save(tmp_path / "m" / "a.png")
    samples = ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], None)
    assert samples[0].image.shape == (16, 24, 3), "the mask was drawn on the photograph as it is stored"

    class Boxes:
        """Draws the box."""

        def segment(self, images, prompts):
            height, width = images[0].shape[:2]
            x1, y1, x2, y2 = (prompts[0][0].boxes[0] * [width, height, width, height]).round().astype(int)
            drawn = np.zeros((height, width), bool)
            drawn[y1:y2, x1:x2] = True
            return [[drawn]]

    (line,) = written(samples, Boxes(), GRAMMAR, Annotator(0.0, 1000, 4), 0.9, Judged())
    assert isinstance(line, dict)
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    read = ChatTraces(str(tmp_path / "t.jsonl"), GRAMMAR, None)[0]
    assert read.image.shape == (24, 16, 3)
    # columns 16-8 .. 16-4 of 16, rows 6 .. 12 of 24
    np.testing.assert_allclose(read.trace.prompt.boxes, [[8 / 16, 6 / 24, 12 / 16, 12 / 24]], atol=1e-6)


SQUARE = [10, 10, 40, 10, 40, 30, 10, 30]


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        (None, "polygons or run lengths"), ([], "three corners"), ([[]], "three corners"),
        ([[1, 2, 3, 4]], "three corners"), ([[10, 10, float("nan"), 10, 40, 30]], "must be within"),
        ([[1e12, 10, 20, 30, 40, 50]], "coordinates must be within"), ([[10, 10, 20]], "two numbers"),
        ([["a"] * 6], "list of numbers"), (["abcdef"], "list of numbers"), (7, "polygons or run"),
        ([[*[99_000, 0, 0, 99_000] * 20]], "outline"), ({}, "size"), ({"size": [60, 100]}, "add up"),
        ({"size": [60, 100], "counts": [-1, 6001]}, "add up"),
        ({"size": [60, 100], "counts": [1, 2]}, "add up"),
        ({"size": [60, 100], "counts": "\u00e9"}, "text of run lengths"),
        ({"size": [60, 100], "counts": "oooo"}, "cut off"),
        ({"size": [60, 99], "counts": [5940]}, "60 rows and 100 columns"),
        ({"size": [60, 100], "counts": [2**70]}, "add up"),
    ],
)  # fmt: skip
def test_a_segmentation_that_draws_nothing_is_refused_and_nothing_dies(drawn, words):
    with pytest.raises(ValueError, match=words):
        read_segmentation(drawn, 60, 100)


def test_two_points_are_no_box_whatever_place_they_have():
    both = read_segmentation([[10, 10, 40, 30], SQUARE], 60, 100)
    assert (both == read_segmentation([SQUARE], 60, 100)).all() and int(both.sum()) == 600


def test_run_lengths_are_those_of_pycocotools():
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (60, 100), (300, 1)):
        for share in (0.0, 0.02, 0.5, 1.0):
            drawn = rng.random((height, width)) < share
            packed = mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
            text = {"size": [height, width], "counts": packed["counts"].decode()}
            assert (read_segmentation(text, height, width) == drawn).all()


def test_a_pickle_that_asks_for_a_table_of_gigabytes_is_refused_before_it_is_made(tmp_path):
    content = pickle.dumps([{"a": "b"}], protocol=2)
    path = tmp_path / "refs(x).p"
    path.write_bytes(content.replace(b"q\x01", b"r\xff\xff\xff\x7f", 1))
    with pytest.raises(ValueError, match=r"refs\(x\)\.p: must be a file of plain data.*place 2147483647"):
        read_refs(path)


def test_a_ref_that_is_not_one_is_named_by_its_place(tmp_path):
    for key, value in (
        ("ann_id", [[1]]),
        ("image_id", None),
        ("split", 3),
        ("sentences", "x"),
        ("sentences", [{"sent": "x"}]),
    ):
        path = tmp_path / "grefs.json"
        path.write_text(json.dumps([ref(1, "val", 1, ("x",)), {**ref(2, "val", 1, ("x",)), key: value}]))
        with pytest.raises(ValueError, match=rf"grefs\.json: ref 2 of 2: {key}"):
            read_refs(path)


def test_a_sample_without_a_trace_or_an_object_cannot_be_imitated():
    blank = Sample(id="blank", image=np.zeros((8, 8, 3), np.uint8), mask=np.zeros((8, 8), bool))
    with pytest.raises(ValueError, match="blank: must have a trace"):
        AsWritten()(blank, np.random.default_rng(0))
    with pytest.raises(ValueError, match="blank: must have an object"):
        Annotator(0.0, 100, 4)(blank, np.random.default_rng(0))
