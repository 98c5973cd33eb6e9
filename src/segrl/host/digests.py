"""Digests of weights: refuse files whose bytes have changed since they were written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

NAME = "SHA256SUMS"
"""Name of the list beside the files, in the format of `sha256sum -c SHA256SUMS`."""

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](\S.*)")
_CARD = "segrl.json"  # marks a folder that segrl has exported
_SHIPPED = Path(__file__).resolve().parents[1] / "assets"  # its one list covers its sub folders, too
_checked: dict[Path, tuple[int, int, int]] = {}


def unchanged(path: Path) -> bool:
    """Return whether this process has checked the file before, and it has not changed since."""
    stat = path.stat()
    return _checked.get(path.resolve()) == (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def passed(path: Path) -> None:
    """Record that a file's digest was right: this process checks the file again only if it changes."""
    stat = path.stat()
    _checked[path.resolve()] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def write(folder: Path, names: Iterable[str]) -> None:
    """Write the list of digests of some files of a folder."""
    lines = []
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    (folder / NAME).write_text("".join(lines))


def check(path: Path, key: str) -> None:
    """Compare a file, or all listed files of a folder, with the digests in the list beside it.

    Each file is read whole once per process, about a second per gigabyte. Files that no list names are not
    checked, and lines about other files are ignored. In a folder that segrl has not exported, listed files
    may be missing.

    Args:
        path: a file or a folder.
        key: the configuration's key of the path, for the error.

    Raises:
        ValueError: if a listed file is missing or has changed, or a line about a file holds no digest.
    """
    folder = path if path.is_dir() else path.parent
    homes = (folder, folder.parent) if folder.resolve().parent == _SHIPPED else (folder,)
    for home in homes:
        for line in _lines(home / NAME):
            listed = _LINE.fullmatch(line)
            if listed is None:
                if any(re.search(rf"(?<![\w.-]){re.escape(name)}$", line) for name in _names(path)):
                    raise ValueError(
                        f"{key}: {home / NAME} must hold a digest of SHA-256 and a name in each line; "
                        f"got {line!r:.80}"
                    )
                continue
            file = home / listed[2]
            theirs = not (folder / _CARD).is_file()  # a mirror, of which only some files may be copied
            if path == file or (path in file.parents and (file.is_file() or not theirs)):
                _check(file, listed[1].lower(), key, home / NAME)


def _lines(sums: Path) -> list[str]:
    """Return the lines of a list; an empty list if the file is missing or cannot be read."""
    try:
        return sums.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _names(path: Path) -> list[str]:
    """Return the name of a file, or the names of the files in a folder."""
    return [one.name for one in path.iterdir() if one.is_file()] if path.is_dir() else [path.name]


def _check(file: Path, digest: str, key: str, sums: Path) -> None:
    """Raise ValueError if a file is missing or its SHA-256 is not `digest`."""
    if not file.is_file():
        raise ValueError(f"{key}: {file} must exist; it is listed in {sums} (copy it again)")
    if unchanged(file):
        return
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
            raise ValueError(
                f"{key}: {file} must be as it was written; its bytes do not have the digest in {sums} "
                f"(copy it again, or delete {NAME} if you changed it yourself)"
            )
    passed(file)
