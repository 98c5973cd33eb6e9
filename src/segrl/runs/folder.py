"""Create a run's folder, and name damaged files of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segrl.host.files import own

_FILES = (
    "config.yaml", "provenance.json", "history.jsonl", "metrics.json", "metrics.csv", "mlflow_run_id", "weights.json",
    "per_sample.jsonl", "evaluation/before.jsonl", "evaluation/before.npz", "evaluation/after.jsonl",
    "evaluation/after.npz", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
)  # fmt: skip
_FOLDERS = ("evaluation", "checkpoints", "sheets", "per_sample.parts", "masks", "overlays")


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


def scored_checkpoint(run: Path) -> Path:
    """Return the checkpoint whose scores a run reports: the best, where one was kept, else the last."""
    best = run / "checkpoints" / "best.ckpt"
    return best if best.is_file() else run / "checkpoints" / "last.ckpt"


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
