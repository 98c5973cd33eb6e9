"""Create and lock a run's folder, write its files atomically, and name damaged ones."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

LOCK = ".owner"  # is there while a process owns the folder, and says which
_FILES = (
    "config.yaml", "provenance.json", "history.jsonl", "metrics.json", "metrics.csv", "mlflow_run_id", "weights.json",
    "per_sample.jsonl", "evaluation/before.jsonl", "evaluation/before.npz", "evaluation/after.jsonl",
    "evaluation/after.npz", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
)  # fmt: skip
_FOLDERS = ("evaluation", "checkpoints", "sheets", "per_sample.parts", "masks", "overlays")
_locks: dict[Path, int] = {}


def create(wanted: Path, alone: bool) -> Path:
    """Make the folder, or the first of wanted-2, wanted-3 ... that does not exist, lock it, and return its path.

    Args:
        wanted: must not exist where other processes count on its name.
        alone: whether this process may choose another name.

    Raises:
        ValueError: if it exists, and no other name may be chosen.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for name in (wanted.name, *(f"{wanted.name}-{i}" for i in range(2, 10_000))):
        folder = wanted.with_name(name)
        try:
            folder.mkdir()  # of two processes one makes it
        except FileExistsError:
            if not alone:
                raise _taken(wanted) from None
            continue
        own(folder, "paths.run")
        return folder
    raise _taken(wanted)


def _taken(folder: Path) -> ValueError:
    return ValueError(
        f"paths.run: a new folder is needed, the same for all processes; {folder} exists (resume={folder} goes on)"
    )


def free_name(wanted: Path) -> Path:
    """Return the name that `create` would choose now."""
    numbered = (wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 10_000))
    return wanted if not wanted.exists() else next(path for path in numbered if not path.exists())


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


def write(path: Path, text: str) -> None:
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


def check_kinds(folder: Path, key: str) -> None:
    """Raise ValueError if a file of a run stands where its folder is a file, or the other way round."""
    for name in _FILES:
        if (path := folder / name).exists() and not path.is_file():
            raise ValueError(f"{key}: {path} must be a file; it is a folder")
    for name in _FOLDERS:
        if (path := folder / name).exists() and not path.is_dir():
            raise ValueError(f"{key}: {path} must be a folder; it is a file")


def read_json(path: Path, key: str, *names: str) -> dict[str, Any]:
    """Return what a JSON file of a run holds.

    Raises:
        ValueError: naming a file that cannot be read, holds no object, or lacks one of `names`.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}: {path} must hold JSON; it cannot be read ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(found, dict) or (missing := [name for name in names if name not in found]):
        what = f"it lacks {missing[0]}" if isinstance(found, dict) else f"it holds a {type(found).__name__}"
        raise ValueError(f"{key}: {path} must hold an object of JSON as it was written; {what}")
    return found
