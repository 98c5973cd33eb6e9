"""ReasonSeg: polygons in the published drawing order, sentences, encodings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import HEIGHT, WIDTH, litter, photograph, polygon, reason
from PIL import Image

from segrl.data.reasoning import ReasonSeg, Shape, draw
from segrl.data.transforms import squash

SQUARE = ((2, 2), (9, 2), (9, 9), (2, 9))  # with its outline, 8 x 8 pixels
INNER = ((4, 4), (6, 4), (6, 6), (4, 6))  # 3 x 3


def shapes(*given: dict[str, object]) -> list[Shape]:
    return [Shape.model_validate(one) for one in given]


def areas(*given: dict[str, object], size: tuple[int, int] = (20, 30)) -> tuple[int, int]:
    mask, ignore = draw(shapes(*given), *size)
    assert mask.dtype == ignore.dtype == bool and mask.shape == ignore.shape == size
    assert not (mask & ignore).any()
    return int(mask.sum()), int(ignore.sum())


# --- drawing


def test_the_fixture_has_the_areas_that_lisas_script_draws(realdata: Path) -> None:
    expected = json.loads((realdata / "reasonseg_style" / "expected_mask_areas_lisa.json").read_text())
    samples = ReasonSeg(str(realdata / "reasonseg_style"), "val", False, None)
    found = {
        s.id: (list(s.mask.shape), int(s.mask.sum()), 0 if s.ignore is None else int(s.ignore.sum()))
        for s in (samples[i] for i in range(len(samples)))
    }
    assert found == {name: (one["hw"], one["target_px"], one["ignore_px"]) for name, one in expected.items()}


def test_an_outline_belongs_to_its_polygon_and_coordinates_are_cut_off() -> None:
    assert areas(polygon("target", *SQUARE)) == (64, 0)
    assert areas(polygon("target", (2.9, 2.9), (9.9, 2.9), (9.9, 9.9), (2.9, 9.9))) == (64, 0)
    assert areas(polygon("target", (5, 5))) == (1, 0)
    assert areas(polygon("target", (5, 5), (9, 5))) == (5, 0)
    assert areas(polygon("target", *SQUARE, (2, 2), (2, 2))) == (64, 0)


def test_a_smaller_polygon_lies_above_a_larger_one_whatever_their_labels_and_order() -> None:
    for order in (1, -1):
        ignored_inside = [polygon("target", *SQUARE), polygon("ignore", *INNER)][::order]
        assert areas(*ignored_inside) == (64 - 9, 9)
        target_inside = [polygon("ignore", *SQUARE), polygon("target", *INNER)][::order]
        assert areas(*target_inside) == (9, 64 - 9)


def test_flags_mean_nothing_and_anything_that_says_ignore_is_ignored() -> None:
    assert areas(polygon("Flag", *SQUARE), polygon("target", *INNER)) == (9, 0)
    assert areas(polygon("ignore_2", *INNER), polygon("IGNORE", (12, 12), (12, 12))) == (0, 10)
    assert areas(polygon("handle", *INNER)) == (9, 0)
    assert areas() == (0, 0)


def test_polygons_may_reach_over_the_border_and_cross_themselves() -> None:
    assert areas(polygon("target", (-5, -5), (4, -5), (4, 4), (-5, 4))) == (25, 0)
    assert areas(polygon("target", (25, 15), (99, 15), (99, 99), (25, 99))) == (25, 0)
    assert areas(polygon("target", (-9, -9), (-3, -9), (-3, -3))) == (0, 0)
    crossing, _ = areas(polygon("target", (2, 2), (12, 12), (12, 2), (2, 12)))
    assert 0 < crossing < 121


# --- files


def sample_of(folder: Path, *, every_sentence: bool = False, side: int | None = None) -> ReasonSeg:
    return ReasonSeg(str(folder), "train", every_sentence, side)


def test_the_first_sentence_is_asked_or_each_is_a_sample_of_its_own(tmp_path: Path) -> None:
    reason(tmp_path / "train", "b", [" Which? ", "What?", "Where?"], [polygon("target", *SQUARE)])
    reason(tmp_path / "train", "a#1", ["the cup"], [polygon("target", *INNER)])
    litter(tmp_path / "train")
    first = sample_of(tmp_path)
    assert first.ids == [first[i].id for i in range(2)] == ["a#1", "b"]
    assert [first[i].query for i in range(2)] == ["the cup", "Which?"]
    every = sample_of(tmp_path, every_sentence=True)
    assert every.ids == [every[i].id for i in range(4)] == ["a#1-0", "b-0", "b-1", "b-2"]
    assert [every[i].query for i in range(4)] == ["the cup", "Which?", "What?", "Where?"]
    assert [every[i].cluster for i in range(4)] == ["a#1", "b", "b", "b"]
    assert {int(every[i].mask.sum()) for i in range(1, 4)} == {64}
    whole = ReasonSeg.survey(root=str(tmp_path), split="train", side=None, **ReasonSeg.whole_split)
    assert [item.id for item in whole.items] == first.ids, "photographs are what is counted"


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_sentences_are_utf_8_or_else_cp1252(tmp_path: Path, encoding: str) -> None:
    reason(tmp_path / "train", "a", ["the café’s door"], [polygon("target", *SQUARE)], encoding)
    assert sample_of(tmp_path)[0].query == "the café’s door"


def test_ignored_pixels_go_along_when_a_sample_is_squashed(tmp_path: Path) -> None:
    left, right = ((0, 0), (11, 0), (11, 15), (0, 15)), ((12, 0), (23, 0), (23, 15), (12, 15))
    reason(tmp_path / "train", "a", ["left"], [polygon("target", *left), polygon("ignore", *right)])
    sample = sample_of(tmp_path, side=8)[0]
    assert sample.mask[:, :4].all() and not sample.mask[:, 4:].any()
    assert sample.ignore is not None and (sample.ignore == ~sample.mask).all()
    reason(tmp_path / "train", "a", ["left"], [polygon("target", *left)])
    plain = sample_of(tmp_path)[0]
    assert plain.ignore is None and squash(plain, 8).ignore is None


def test_the_photograph_is_as_the_camera_meant_it_for_so_the_polygons_were_drawn(tmp_path: Path) -> None:
    reason(tmp_path / "train", "a", ["top"], [polygon("target", (0, 0), (15, 0), (15, 3), (0, 3))])
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tmp_path / "train" / "a.jpg") as image:
        image.save(tmp_path / "train" / "a.jpg", exif=exif.tobytes())
    sample = sample_of(tmp_path)[0]
    assert sample.mask.shape == sample.image.shape[:2] == (WIDTH, HEIGHT)
    assert sample.mask[:4].all() and sample.mask.sum() == 4 * HEIGHT


# --- refusals


def test_what_stands_alone_is_named(tmp_path: Path) -> None:
    reason(tmp_path / "train", "a", ["x"], [])
    photograph(tmp_path / "train" / "lonely.jpg")
    with pytest.raises(
        ValueError, match=r"train: must hold a \.json for every image; there is none for lonely"
    ):
        sample_of(tmp_path)
    (tmp_path / "train" / "lonely.jpg").rename(tmp_path / "train" / "other.jpg")
    (tmp_path / "train" / "other.jpg").unlink()
    (tmp_path / "train" / "orphan.json").write_bytes((tmp_path / "train" / "a.json").read_bytes())
    with pytest.raises(ValueError, match=r"must hold an image for every \.json; there is none for orphan"):
        sample_of(tmp_path)


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a folder train; there is none"):
        sample_of(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="the folder holds none"):
        sample_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b'{"text": [], "shapes": []}', "text"),
        (b'{"text": "one", "shapes": []}', "text"),
        (b'{"text": ["x"]}', "shapes"),
        (b'{"text": ["x"], "shapes": [{"label": "target", "points": []}]}', "shapes.0.points"),
        (b'{"text": ["x"], "shapes": [{"label": "target", "points": [[NaN, 1]]}]}', "shapes.0.points.0.0"),
        (b"[]", "a.json: must be a valid dictionary"),
    ],
)
def test_a_json_that_is_no_annotation_is_named_with_what_it_lacks(
    tmp_path: Path, content: bytes, words: str
) -> None:
    reason(tmp_path / "train", "a", ["x"], [])
    (tmp_path / "train" / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: ") as refusal:
        sample_of(tmp_path)
    assert words in str(refusal.value)


def test_a_photograph_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    reason(tmp_path / "train", "a", ["x"], [])
    (tmp_path / "train" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.jpg: must be an image"):
        sample_of(tmp_path)[0]


def test_squash_ignores_a_new_pixel_if_at_least_half_of_it_was_ignored(tmp_path: Path) -> None:
    from segrl.types import Sample

    ignore = np.zeros((4, 4), bool)
    ignore[:2, :2] = True
    ignore[2, 2] = True
    sample = Sample(id="a", image=np.zeros((4, 4, 3), np.uint8), mask=np.zeros((4, 4), bool), ignore=ignore)
    assert squash(sample, 2).ignore.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("far", [1e12, -1e12, 40_000, "NaN", "Infinity", 10**400])
def test_a_coordinate_that_no_image_has_is_refused_by_file_and_key(tmp_path: Path, far: object) -> None:
    reason(tmp_path / "val", "a", ["what?"], [polygon("target", (1, 1), (7777, 1), (5, 5))])
    path = tmp_path / "val" / "a.json"
    path.write_text(path.read_text().replace("7777", str(far)))
    with pytest.raises(ValueError, match=r"a\.json: shapes\.0\.points\.1\.0"):
        ReasonSeg(str(tmp_path), "val", False, None)
    assert len(ReasonSeg.survey(str(tmp_path), "val", False, None).faults) == 1
