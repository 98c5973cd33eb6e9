"""Checkpoints that a kill cannot spoil."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from segrl.metrics.direction import better, worst


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames, so what was saved before is intact until the new one is whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Save, flush to the disk, rename. Raises OSError if the disk is full; the earlier file then stays."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = error.filename or str(target)
                raise
            # torch's zip writer reports a full disk as a RuntimeError
            raise OSError(28, "no space left, or the disk failed, while saving", str(target)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values only. Raises ValueError naming a file that is cut off or no checkpoint."""
        return read_checkpoint(Path(path), "ckpt_path")


def read_checkpoint(path: Path, key: str) -> dict[str, Any]:
    """A checkpoint's contents on the CPU; ValueError naming `key` and the file if it is cut off, foreign or unsafe."""
    if not path.is_file():
        raise ValueError(f"{key}: a checkpoint is needed; there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{key}: a checkpoint is needed; {path} is cut off or is none")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{key}: a checkpoint of tensors and plain values is needed; {path} cannot be read ({reason})"
        ) from None
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise ValueError(f"{key}: a checkpoint of a segrl stage is needed; {path} holds no state_dict")
    return loaded


def learned_policy(path: Path, key: str) -> dict[str, Tensor]:
    """The policy's weights in a checkpoint; raises ValueError naming the key if it holds none."""
    weights = read_checkpoint(path, key)["state_dict"]
    learned = {name.removeprefix("policy."): v for name, v in weights.items() if name.startswith("policy.")}
    if not learned:
        raise ValueError(f"{key}: a checkpoint that holds a policy is needed; {path} holds none")
    return learned


class EveryNSteps(lightning.Callback):
    """Saves every n updates, at the end, and when the process is asked to stop.

    Args:
        path: one file, written anew each time.
        every_n_steps: n.
    """

    def __init__(self, path: str, every_n_steps: int) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.saved_at = 0
        self.due = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """What is loaded need not be saved again."""
        self.saved_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Save if it is time, or if SIGTERM came: Lightning then leaves the loop."""
        passed = trainer.global_step // self.every_n_steps > self.saved_at // self.every_n_steps
        # After an epoch's last batch Lightning has not closed the epoch yet: a run resumed from there would repeat it.
        self.due = passed or trainer.received_sigterm
        if self.due and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """What was due at the epoch's last batch."""
        if self.due:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save what was learned where a server or a file is gone; of several ranks the others do not know of it."""
        if isinstance(exception, ValueError) and trainer.training and trainer.world_size == 1:
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        """On all ranks: a strategy may have shares to gather."""
        if self.saved_at != trainer.global_step:
            self.saved_at = trainer.global_step
            trainer.save_checkpoint(self.path)


class KeepBest(lightning.Callback):
    """Saves whenever a validation metric is better than ever; the run is then scored with that checkpoint.

    Args:
        path: one file, written anew each time.
        monitor: such as `val/synthetic/sm`, whose kind says whether more or less is better; None keeps nothing.
    """

    def __init__(self, path: str, monitor: str | None) -> None:
        self.path, self.monitor = path, monitor
        self.best = worst(monitor or "")

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """From a checkpoint."""
        self.best = state_dict["best"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Gone on with in a new folder, the best is still to come."""
        if not Path(self.path).is_file():
            self.best = worst(self.monitor or "")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save, if it is the best; raises ValueError for a metric that was not validated."""
        if self.monitor is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ValueError(f"callbacks.best.monitor: one of {known} is needed; got {self.monitor}")
        value = float(trainer.callback_metrics[self.monitor])
        if better(self.monitor, value, self.best):
            self.best = value
            trainer.save_checkpoint(self.path)
