"""The RefCOCO family, and chat traces."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from segrl.data.chat_traces import AsWritten, ChatTraces
from segrl.data.referring import ReferringExpressions, read_refs, read_segmentation
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


GRAMMAR = SegR1Tags(4, 8)


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
