"""Lock a folder for one process, and write files atomically."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

LOCK = ".owner"  # exists while a process owns the folder, and holds its id
_locks: dict[Path, int] = {}


def lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed.

    Returns:
        True if it is locked now, False if it was locked already, None on a disk without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def own(folder: Path, key: str) -> None:
    """Lock a folder until `release` or the end of this process, even if it is killed.

    On a file system without locks it does nothing.

    Args:
        folder: an existing folder.
        key: the configuration's key of the folder, for the error.

    Raises:
        ValueError: if the folder is locked already, by another process or by this one.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked = lock(descriptor)
        if not locked:
            said = os.read(descriptor, 40).decode(errors="replace").strip()
            os.close(descriptor)
            if locked is None:
                return
            raise ValueError(
                f"{key}: {folder} must be free; it is used by another process "
                f"(pid {said or 'not known'}): wait for its end, or end it"
            )
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)  # the owner has just deleted this file: try again
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    _locks[path.resolve()] = descriptor


def release() -> None:
    """Unlock every folder that this process owns."""
    while _locks:
        path, descriptor = _locks.popitem()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _forget() -> None:
    """Close the locks in a forked worker: they belong to its parent."""
    while _locks:
        os.close(_locks.popitem()[1])


os.register_at_fork(after_in_child=_forget)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: if writing is interrupted, its earlier content remains."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # name the file itself, not the temporary one
        raise
    finally:
        partial.unlink(missing_ok=True)
