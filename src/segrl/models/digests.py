"""Digests of files of weights: bits that changed since they were written are refused instead of being used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

NAME = "SHA256SUMS"
"""Beside the files, in the format of sha256sum: `sha256sum -c SHA256SUMS` checks them, too."""

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
    """Hold a file, or all files of a folder, against the digests beside it or one folder above; of others nothing is known.

    It reads them whole, once in a process: about a second per gigabyte.

    Raises:
        ValueError: naming a file that is gone or was changed since the digests were written.
    """
    folder = path if path.is_dir() else path.parent
    for home in (folder, folder.parent):
        for name, digest in _listed(home / NAME, key).items():
            file = home / name
            if path == file or path in file.parents:
                _check(file, digest, key, home / NAME)


def _listed(sums: Path, key: str) -> dict[str, str]:
    """The digest of each name; of none where there is no list."""
    try:
        lines = sums.read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: {sums} must hold digests; it cannot be read ({error})") from None
    listed = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise ValueError(f"{key}: {sums} must hold a digest and a name a line; got {line!r:.80}")
        listed[name] = digest
    if not listed:
        raise ValueError(f"{key}: {sums} must hold digests; it is empty")
    return listed


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
