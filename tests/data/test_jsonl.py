"""Any dataset as a list of lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import photograph, truth

from segrl.data.jsonl import JsonlDataset


def listed(tmp_path: Path, *lines: object, root: str | None = None) -> JsonlDataset:
    for name in ("a", "b"):
        photograph(tmp_path / "i" / f"{name}.jpg")
        truth(tmp_path / "m" / f"{name}.png")
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return JsonlDataset(str(path), root, None)


A, B = {"image": "i/a.jpg", "mask": "m/a.png"}, {"image": "i/b.jpg", "mask": "m/b.png"}


def test_lines_are_samples_in_order_and_several_may_share_an_image(tmp_path: Path) -> None:
    found = listed(tmp_path, B, "", {**A, "query": "the crab"}, {**A, "query": "the shell", "id": "shell"})
    assert found.ids == [found[i].id for i in range(3)] == ["b", "a-2", "shell"]
    assert [found[i].query for i in range(3)] == [None, "the crab", "the shell"]
    assert [found[i].cluster for i in range(3)] == ["i/b.jpg", "i/a.jpg", "i/a.jpg"]
    assert found[1].mask.sum() == 24 and found[1].path == tmp_path / "i" / "a.jpg"


def test_files_are_relative_to_the_root_where_one_is_named(tmp_path: Path) -> None:
    listed(tmp_path, A)
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "l.jsonl"
    path.write_text('\ufeff{"image": "i/a.jpg", "mask": "m/a.png", "id": 7}\r\n', encoding="utf-8")
    assert JsonlDataset(str(path), str(tmp_path), None).ids == ["7"]
    with pytest.raises(ValueError, match=r"there is none for line 1 \(i/a.jpg\)"):
        JsonlDataset(str(path), None, None)


def test_side_resizes(tmp_path: Path) -> None:
    listed(tmp_path, A)
    assert JsonlDataset(str(tmp_path / "list.jsonl"), None, 8)[0].image.shape == (8, 8, 3)


def test_a_line_separator_inside_a_sentence_does_not_end_the_line(tmp_path: Path) -> None:
    found = listed(tmp_path, json.dumps({**A, "query": "one\u2028two"}, ensure_ascii=False))
    assert found[0].query == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: must be JSON"),
        ({"image": "i/a.jpg"}, "line 2: mask: must be given"),
        ({**A, "image": ""}, "line 2: image"),
        ({**A, "query": ["x"]}, "line 2: query"),
        ("[]", "line 2: "),
        ({**A, "image": "i/z.jpg"}, r"there is none for line 2 \(i/z.jpg\)"),
        ({**A, "mask": "m/z.png"}, r"there is none for line 2 \(m/z.png\)"),
        ({**A, "id": "b"}, "line 2: id must be unique; b occurs twice"),
        ({**A, "querry": "x"}, r"line 2: querry: there is no such key; did you mean query\?"),
        ({**A, "mask": "list.jsonl"}, "cannot be decoded"),
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        listed(tmp_path, B, line)


def test_a_list_that_is_missing_empty_or_in_another_encoding_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl: must be a \.jsonl.*no such file"):
        JsonlDataset(str(tmp_path / "x.jsonl"), None, None)
    with pytest.raises(ValueError, match="the file is empty"):
        listed(tmp_path, "")
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"image": "é"}'.encode("latin1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1"):
        JsonlDataset(str(path), None, None)
