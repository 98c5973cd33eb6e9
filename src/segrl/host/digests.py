"""Digests of files of weights: bits that changed since they were written are refused instead of being used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

NAME = "SHA256SUMS"
"""Beside the files, in the format of sha256sum: `sha256sum -c SHA256SUMS` checks them, too."""

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](\S.*)")
_CARD = "segrl.json"  # beside what segrl has exported
_SHIPPED = Path(__file__).resolve().parents[1] / "assets"  # one list for the weights of all its folders
_checked: dict[Path, tuple[int, int, int]] = {}


def unchanged(path: Path) -> bool:
    """Return whether this process has checked the very same file before."""
    stat = path.stat()
    return _checked.get(path.resolve()) == (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def passed(path: Path) -> None:
    """Remember a file whose digest was right: it is read several times in a run, and checked once."""
    stat = path.stat()
    _checked[path.resolve()] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def write(folder: Path, names: Iterable[str]) -> None:
    """Write the digests of files of a folder."""
    lines = []
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    (folder / NAME).write_text("".join(lines))


def check(path: Path, key: str) -> None:
    """Hold a file, or all files of a folder, against the digests beside it; of files that no list names nothing is known.

    It reads them whole, once in a process: about a second per gigabyte. The list may be anybody's: lines about other files
    than those that are asked for are passed over.

    Raises:
        ValueError: naming a file that is gone or was changed since the digests were written, or a line about it that holds
            no digest.
    """
    folder = path if path.is_dir() else path.parent
    homes = (folder, folder.parent) if folder.resolve().parent == _SHIPPED else (folder,)
    for home in homes:
        for line in _lines(home / NAME):
            listed = _LINE.fullmatch(line)
            if listed is None:
                if any(re.search(rf"(?<![\w.-]){re.escape(name)}$", line) for name in _names(path)):
                    raise ValueError(
                        f"{key}: {home / NAME} must hold a digest of SHA-256 and a name a line; got {line!r:.80}"
                    )
                continue
            file = home / listed[2]
            theirs = not (folder / _CARD).is_file()  # of a mirror, from which not all need be copied
            if path == file or (path in file.parents and (file.is_file() or not theirs)):
                _check(file, listed[1].lower(), key, home / NAME)


def _lines(sums: Path) -> list[str]:
    """The lines of a list; none where there is no list, or none that can be read."""
    try:
        return sums.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _names(path: Path) -> list[str]:
    """Of a file, or of the files of a folder."""
    return [one.name for one in path.iterdir() if one.is_file()] if path.is_dir() else [path.name]


def _check(file: Path, digest: str, key: str, sums: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{key}: {file} is needed; it is listed in {sums} and is not there")
    if unchanged(file):
        return
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
            raise ValueError(
                f"{key}: {file} must be as it was written; its bytes are others than {sums} says "
                f"(copy it again, or delete {NAME} where you changed it yourself)"
            )
    passed(file)
