"""Checkpoints: atomic writes with a digest, callbacks that save, and stopping on signals."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from segrl.host import digests, signals
from segrl.metrics.direction import better, worst

# torch writes a zip file; its comment is the mark and 64 hexadecimal digits
_MARK = b"segrl sha256 "
# bytes of the comment, and of the zip's end record without it, which ends with the comment's length
_COMMENT, _END = len(_MARK) + 64, 22


class _Hashed:
    """Writer that computes the SHA-256 of what it writes.

    Args:
        file: open file to write to.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash the data; return the number of bytes written."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

    def seal(self) -> None:
        """Append the digest of all bytes as the comment of the zip file."""
        self.file.seek(-2, os.SEEK_END)
        self.file.write(_COMMENT.to_bytes(2, "little") + _MARK + self.digest.hexdigest().encode())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that writes to a temporary file and renames it: a kill leaves the earlier checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Save, sync to the disk, rename. Raise OSError if the disk is full; the earlier file then stays."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                hashed = _Hashed(file)
                torch.save(checkpoint, hashed)  # type: ignore[arg-type]  # needs only write and flush
                hashed.seal()
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
        """Load a checkpoint; see `read_checkpoint`. `map_location` and `weights_only` are ignored."""
        return read_checkpoint(Path(path), "ckpt_path")


def _check_bytes(path: Path, key: str) -> None:
    """Raise ValueError unless the file matches its digest or, without one, the zip's own checksums.

    The whole file is read, once per process: 45 GB take about half a minute on one core.
    """
    if digests.unchanged(path):
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(-min(size, _COMMENT + _END), os.SEEK_END)
        end = file.read()
        sealed = end[_END:].startswith(_MARK) and end.startswith(b"PK\5\6")
        if sealed:
            file.seek(0)
            digest, left = hashlib.sha256(), size - _COMMENT - 2
            while left:
                part = file.read(min(left, 1 << 22))
                digest.update(part)
                left -= len(part)
            digest.update(b"\0\0")  # in place of the comment's length, which was 0 when the file was hashed
            whole = digest.hexdigest().encode() == end[-64:]
            whole = whole and int.from_bytes(end[_END - 2 : _END], "little") == _COMMENT
        elif end[-_END:].startswith(b"PK\5\6"):  # written by torch alone, without a digest
            try:
                with zipfile.ZipFile(path) as archive:
                    whole = archive.testzip() is None
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError):
                whole = False
        else:
            raise ValueError(f"{key}: must be a checkpoint; {path} is truncated or not a checkpoint")
    if not whole:
        raise ValueError(
            f"{key}: must be a checkpoint as it was written; "
            f"the bytes of {path} have changed since (use another copy or an earlier checkpoint)"
        )
    digests.passed(path)


def read_checkpoint(path: Path, key: str) -> dict[str, Any]:
    """Return a checkpoint's contents on the CPU.

    Raises:
        ValueError: naming `key` and the file, if it is missing, truncated, changed, of another program, or
            holds more than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f"{key}: must be a checkpoint; there is no file {path}")
    _check_bytes(path, key)
    return _load(path, key)


def saved_step(path: Path) -> int:
    """Return the update of a checkpoint file without reading its weights.

    Raises:
        ValueError: if the file is missing or no checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: must be a file; there is no file {path}")
    return int(_load(path, "checkpoint")["global_step"])


def _load(path: Path, key: str) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{key}: must be a checkpoint of tensors and plain values; {path} cannot be read ({reason})"
        ) from None
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise ValueError(f"{key}: must be a checkpoint of a segrl stage; {path} holds no state_dict")
    return loaded


def learned_policy(path: Path, key: str) -> dict[str, Tensor]:
    """Return the policy's weights of a checkpoint. Raise ValueError naming `key` if it holds none."""
    weights = read_checkpoint(path, key)["state_dict"]
    learned = {name.removeprefix("policy."): v for name, v in weights.items() if name.startswith("policy.")}
    if not learned:
        raise ValueError(f"{key}: must be a checkpoint that holds a policy; {path} holds none")
    return learned


class EveryNSteps(lightning.Callback):
    """Callback that saves every n updates, at the end of the training, and for `Stop`.

    Args:
        path: file, replaced each time.
        every_n_steps: number of updates between checkpoints.
    """

    def __init__(self, path: str, every_n_steps: int) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.saved_at = 0
        self.due = False
        self.loops: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the update from which the training starts: it is not saved again."""
        self.saved_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Save every `every_n_steps` updates; at an epoch's last batch, leave it to `on_train_epoch_end`."""
        self.due = trainer.global_step // self.every_n_steps > self.saved_at // self.every_n_steps
        # At an epoch's last batch Lightning has not ended the epoch: a run resumed there would repeat it.
        if self.due and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what was due at the epoch's last batch."""
        if self.due:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last update."""
        self.save(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save after a ValueError in training, such as a lost server or file, if there is one rank.

        With several ranks the others do not know of the error and would not take part in saving.
        """
        if isinstance(exception, ValueError) and trainer.training and trainer.world_size == 1:
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Replace the state of the fit loop, if `save` was given another one to resume from."""
        if self.loops is not None:
            checkpoint["loops"]["fit_loop"] = self.loops

    def save(self, trainer: lightning.Trainer, loops: dict[str, Any] | None = None) -> None:
        """Save; must be called on all ranks, because a strategy may have to gather shards.

        Args:
            trainer: trainer of the run.
            loops: state of the fit loop to resume from; if None, the present one, and an update that is
                already saved is not saved again.
        """
        if self.saved_at != trainer.global_step or loops is not None:
            self.saved_at, self.loops = trainer.global_step, loops
            trainer.save_checkpoint(self.path)
            self.loops = None


class Stop(lightning.Callback):
    """Callback that ends a training after SIGINT or SIGTERM: all ranks at the same point, after saving.

    These points are the ends of batches, of epochs and of validation batches. A run that was stopped in a
    validation repeats it from the beginning when it is resumed.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.validation: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Install the signal handlers, and stop without saving if a signal has come already."""
        signals.take()
        if (signum := self._agreed(trainer)) is not None:
            self._leave(trainer, signum)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Save and stop if a signal came; at an epoch's last batch, wait for the end of the epoch."""
        self.pending = self._agreed(trainer)
        if self.pending is not None and not trainer.is_last_batch:
            self._save_and_leave(trainer, self.pending, None)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save and stop if a signal came."""
        signum = self.pending or self._agreed(trainer)
        if signum is not None:
            self._save_and_leave(trainer, signum, None)

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the state of the fit loop at the start of a validation, which a resumed run repeats.

        If a signal came at the epoch's last batch, save and stop here.
        """
        if trainer.sanity_checking or not trainer.validating or batch_idx or dataloader_idx:
            return
        self.validation = trainer.fit_loop.state_dict()
        begun = self.validation["epoch_loop.val_loop.batch_progress"]
        for count in (begun["total"], begun["current"]):
            count["started"] += 1
        if self.pending is not None and self._everywhere(trainer, 0, 0):
            self._save_and_leave(trainer, self.pending, self.validation)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and stop if a signal came; the resumed run repeats the validation."""
        if trainer.sanity_checking or not trainer.validating:
            return
        if not self._everywhere(trainer, batch_idx, dataloader_idx):
            return
        if (signum := self._agreed(trainer)) is not None:
            self._save_and_leave(trainer, signum, self.validation)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Install the signal handlers."""
        signals.take()

    def on_test_batch_end(self, *_: object) -> None:
        """Stop if a signal came while signals were held back."""
        signals.check()

    @staticmethod
    def _everywhere(trainer: lightning.Trainer, batch_idx: int, dataloader_idx: int) -> bool:
        """Return whether every rank has this validation batch; only then all ranks can agree to stop."""
        data, ranks = trainer.datamodule, trainer.world_size  # type: ignore[attr-defined]
        least = len(list(data.val.values())[dataloader_idx]) // ranks
        return ranks == 1 or batch_idx < -(-least // data.eval_batch_size)

    @staticmethod
    def _agreed(trainer: lightning.Trainer) -> int | None:
        """Return the largest number of a signal that a rank got, on all ranks; None if none came."""
        signum = signals.asked() or 0
        if trainer.world_size > 1:
            told = torch.tensor(signum, device=trainer.strategy.root_device)
            signum = int(trainer.strategy.reduce(told, reduce_op="max"))
        return signum or None

    def _save_and_leave(
        self, trainer: lightning.Trainer, signum: int, loops: dict[str, Any] | None
    ) -> NoReturn:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EveryNSteps):
                callback.save(trainer, loops)
        self._leave(trainer, signum)

    @staticmethod
    def _leave(trainer: lightning.Trainer, signum: int) -> NoReturn:
        trainer.loggers = []  # Lightning would report the run as failed to its loggers
        raise signals.Stopped(signum, agreed=True)


class KeepBest(lightning.Callback):
    """Callback that saves whenever a validation metric improves; the run is then scored with that checkpoint.

    Args:
        path: file, replaced each time.
        monitor: metric such as `val/synthetic/sm`; `metrics.direction` says whether more or less is better.
            If None, nothing is saved.
    """

    def __init__(self, path: str, monitor: str | None) -> None:
        self.path, self.monitor = path, monitor
        self.best = worst(monitor or "")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its metric, for a checkpoint."""
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value from a checkpoint, unless it is of another metric."""
        if state_dict.get("monitor", self.monitor) == self.monitor:
            self.best = state_dict["best"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reset the best value if its file is missing, as after a resume in a new folder."""
        if not Path(self.path).is_file():
            self.best = worst(self.monitor or "")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save if the metric is the best so far. Raise ValueError for a metric that was not validated."""
        if self.monitor is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ValueError(f"callbacks.best.monitor: must be one of {known}; got {self.monitor}")
        value = float(trainer.callback_metrics[self.monitor])
        if better(self.monitor, value, self.best):
            self.best = value
            trainer.save_checkpoint(self.path)
