"""Create a run's folder, and check and read its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segrl.host.files import own

_FILES = (
    "config.yaml", "provenance.json", "history.jsonl", "metrics.json", "metrics.csv", "mlflow_run_id",
    "weights.json", "per_sample.jsonl", "evaluation/before.jsonl", "evaluation/before.npz",
    "evaluation/after.jsonl", "evaluation/after.npz", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
)  # fmt: skip
_FOLDERS = ("evaluation", "checkpoints", "sheets", "per_sample.parts", "masks", "overlays")


def create(wanted: Path, alone: bool) -> Path:
    """Create and lock a run's folder and return its path: `wanted`, or the first free of wanted-2, -3 ...

    Args:
        wanted: path of the folder; its parents are created, too.
        alone: whether this process may choose another name; with several ranks all must use `wanted`.

    Raises:
        ValueError: if `wanted` exists and no other name may be chosen.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for name in (wanted.name, *(f"{wanted.name}-{i}" for i in range(2, 10_000))):
        folder = wanted.with_name(name)
        try:
            folder.mkdir()  # atomic: of two processes only one succeeds
        except FileExistsError:
            if not alone:
                raise _taken(wanted) from None
            continue
        own(folder, "paths.run")
        return folder
    raise _taken(wanted)


def _taken(folder: Path) -> ValueError:
    return ValueError(
        f"paths.run: must be a new folder, the same for all processes; {folder} exists "
        f"(resume={folder} continues that run)"
    )


def free_name(wanted: Path) -> Path:
    """Return the path that `create` would choose now."""
    numbered = (wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 10_000))
    return wanted if not wanted.exists() else next(path for path in numbered if not path.exists())


def scored_checkpoint(run: Path) -> Path:
    """Return the checkpoint whose scores a run reports: best.ckpt if it exists, else last.ckpt."""
    best = run / "checkpoints" / "best.ckpt"
    return best if best.is_file() else run / "checkpoints" / "last.ckpt"


def check_kinds(folder: Path, key: str) -> None:
    """Raise ValueError if a run's file is a folder in `folder`, or a run's folder is a file."""
    for name in _FILES:
        if (path := folder / name).exists() and not path.is_file():
            raise ValueError(f"{key}: {path} must be a file; it is a folder")
    for name in _FOLDERS:
        if (path := folder / name).exists() and not path.is_dir():
            raise ValueError(f"{key}: {path} must be a folder; it is a file")


def read_json(path: Path, key: str, *names: str) -> dict[str, Any]:
    """Return the object in a JSON file of a run.

    Args:
        path: path of the file.
        key: first word of an error message.
        names: keys that the object must have.

    Raises:
        ValueError: naming the file, if it cannot be read, holds no object, or lacks a key.
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
