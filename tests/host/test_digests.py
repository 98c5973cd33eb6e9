"""Digests beside weights are read whether segrl or somebody else wrote them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from segrl.host import digests

RIGHT = hashlib.sha256(b"weights").hexdigest()
WRONG = hashlib.sha256(b"others").hexdigest()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "set" / "model.pt"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    return file


@pytest.mark.parametrize(
    "line", [f"{RIGHT}  model.pt", f"{RIGHT} *model.pt", f"{RIGHT.upper()}  model.pt", f"{WRONG} *model.pt"]
)
def test_a_line_of_sha256sum_is_read(weights: Path, line: str) -> None:
    (weights.parent / digests.NAME).write_text(f"{line}\n")
    for path in (weights, weights.parent):
        if WRONG in line:
            with pytest.raises(ValueError, match=r"model\.pt must be as it was written"):
                digests.check(path, "key")
        else:
            digests.check(path, "key")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# sums of a mirror\n\n",
        b"\xff\xfe\x00",
        f"{WRONG}  other.pt\n".encode(),
        b"d41d8  a_model.pt\n",
    ],
)
def test_a_list_that_says_nothing_of_the_file_is_passed_over(weights: Path, content: bytes) -> None:
    (weights.parent / digests.NAME).write_bytes(content)
    digests.check(weights, "key")


def test_files_of_a_mirror_need_not_be_there_and_those_of_an_export_must(weights: Path) -> None:
    (weights.parent / digests.NAME).write_text(f"{RIGHT}  model.pt\n{WRONG}  more/other.pt\n")
    digests.check(weights.parent, "key")
    (weights.parent / "segrl.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.pt must exist; it is listed"):
        digests.check(weights.parent, "key")


def test_a_list_one_folder_above_is_not_read(weights: Path) -> None:
    (weights.parent.parent / digests.NAME).write_text(f"{WRONG}  set/model.pt\nno digest  model.pt\n")
    digests.check(weights, "key")
    digests.check(weights.parent, "key")


def test_a_damaged_line_about_the_file_is_refused(weights: Path) -> None:
    (weights.parent / digests.NAME).write_text(f"{RIGHT[:-1]}  model.pt\n")
    with pytest.raises(ValueError, match="must hold a digest of SHA-256"):
        digests.check(weights, "key")
