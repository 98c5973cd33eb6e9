"""The layout of a run folder, how it is created, and how its files are checked and read.

No other module spells the name of a file in it; `conf/` names the files that callbacks write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segrl.host.files import own


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a training or of an evaluation.

    Args:
        path: of the folder, which need not exist.
    """

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder:
        """Return the folder of the run that wrote a checkpoint."""
        return cls(checkpoint.absolute().parent.parent)

    @property
    def config(self) -> Path:
        """Configuration, unresolved."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Command, commit, versions and hardware."""
        return self.path / "provenance.json"

    @property
    def history(self) -> Path:
        """Scalars of each update, a line of JSON each."""
        return self.path / "history.jsonl"

    @property
    def validation(self) -> Path:
        """Scalars of each validation, a line of JSON each."""
        return self.path / "validation.jsonl"

    @property
    def mlflow_run_id(self) -> Path:
        """Id of the run in MLflow."""
        return self.path / "mlflow_run_id"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """Checkpoint to resume from."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """Best checkpoint in validation; exists only if the run has `callbacks.best.monitor`."""
        return self.checkpoints / "best.ckpt"

    @property
    def scored(self) -> Path:
        """Checkpoint whose scores the run reports: the best one if it exists, else the last one."""
        return self.best if self.best.is_file() else self.last

    @property
    def before(self) -> Path:
        """File with a line per test sample, scored before the training; see `runs.records`."""
        return self.path / "evaluation" / "before.jsonl"

    @property
    def after(self) -> Path:
        """File with a line per test sample, scored after the training."""
        return self.path / "evaluation" / "after.jsonl"

    @property
    def per_sample(self) -> Path:
        """File with a line per sample of an evaluation."""
        return self.path / "per_sample.jsonl"

    @property
    def parts(self) -> Path:
        """Folder of the lines that each rank of an evaluation writes, until they are joined."""
        return self.path / "per_sample.parts"

    @property
    def stamps(self) -> Path:
        """State of the weights and instructions with which an evaluation began."""
        return self.path / "weights.json"

    @property
    def metrics(self) -> Path:
        """Scores; a run with this file is finished."""
        return self.path / "metrics.json"

    @property
    def finished(self) -> bool:
        """True if `metrics.json` exists, which a run writes last."""
        return self.metrics.is_file()

    @property
    def table(self) -> Path:
        """The printed table."""
        return self.path / "table.txt"

    @property
    def curve(self) -> Path:
        """Picture of the scalars over the updates."""
        return self.path / "reward_curve.png"

    @property
    def picture(self) -> Path:
        """Picture of the first test samples before and after."""
        return self.path / "before_after.png"

    @property
    def sheets(self) -> Path:
        """Folder of the pictures of rollouts."""
        return self.path / "sheets"

    @property
    def masks(self) -> Path:
        """Folder of the masks of an evaluation, if `suite.masks` is set."""
        return self.path / "masks"

    @property
    def overlays(self) -> Path:
        """Folder of the pictures of an evaluation, if `suite.overlays` is set."""
        return self.path / "overlays"

    @property
    def artifacts(self) -> list[Path]:
        """Files and folders that MLflow copies."""
        return [
            self.metrics, self.table, self.config, self.provenance, self.history, self.validation, self.curve,
            self.picture, self.sheets, self.before.parent, self.per_sample, self.overlays, self.masks,
            self.checkpoints,
        ]  # fmt: skip

    def check_kinds(self, key: str) -> None:
        """Raise ValueError if a folder stands in place of a file of the run, or a file for a folder."""
        folders = [self.before.parent, self.checkpoints, self.sheets, self.parts, self.masks, self.overlays]
        files = [
            self.config, self.provenance, self.history, self.validation, self.metrics, self.mlflow_run_id,
            self.path / "metrics.csv", self.stamps, self.per_sample, self.last, self.best, self.before,
            self.after, masks_beside(self.before), masks_beside(self.after),
        ]  # fmt: skip
        for path in files:
            if path.exists() and not path.is_file():
                raise ValueError(f"{key}: {path} must be a file; it is a folder")
        for path in folders:
            if path.exists() and not path.is_dir():
                raise ValueError(f"{key}: {path} must be a folder; it is a file")


def masks_beside(lines: Path) -> Path:
    """Return the file of the masks of the first samples in a training's `before` or `after`."""
    return lines.with_suffix(".npz")


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
