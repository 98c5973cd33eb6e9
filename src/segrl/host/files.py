"""Lock a folder for one process, and write files whole."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

LOCK = ".owner"  # is there while a process owns the folder, and says which
_locks: dict[Path, int] = {}


def own(folder: Path, key: str) -> None:
    """Lock a folder until `release`, or until this process ends, however it ends.

    Raises:
        ValueError: if another process owns it.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = os.read(descriptor, 40).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"{key}: {folder} is used by another process (pid {said or 'not known'}): wait for its end, or end it"
                ) from None
            return  # a file system that knows no locks
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)  # its owner was just taking it away
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    _locks[path.resolve()] = descriptor


def release() -> None:
    """Give back every folder that this process owns."""
    while _locks:
        path, descriptor = _locks.popitem()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _forget() -> None:
    """In a forked worker: the lock is its parent's, and ends with it."""
    while _locks:
        os.close(_locks.popitem()[1])


os.register_at_fork(after_in_child=_forget)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was, whatever happens meanwhile."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # the file that the user asked for
        raise
    finally:
        partial.unlink(missing_ok=True)
