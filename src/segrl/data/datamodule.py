"""Build the loaders of the training, validation and test sets."""

from __future__ import annotations

from typing import cast

import lightning
from torch.utils.data import DataLoader, Dataset

from segrl.data.collate import Collate, EvalShard, ResumableShuffle
from segrl.host import signals
from segrl.protocols import SampleSet
from segrl.types import Sample


def begin_worker(worker: int) -> None:
    """Ignore stop signals and end with the parent: a worker neither outlives its run nor ends before it."""
    signals.leave_to_parent()


class SegDataModule(lightning.LightningDataModule):
    """The loaders of a run's datasets.

    Args:
        train: the training set.
        val: validation sets by name, scored during training as `val/<name>/<metric>`.
        test: test sets by name, scored before and after training.
        batch_size: samples (not completions) of one update, per rank.
        eval_batch_size: samples of one evaluation step, per rank.
        workers: loader processes per loader; 0 loads in the training process.
        seed: seed of the order of training samples.
    """

    def __init__(
        self,
        train: SampleSet,
        val: dict[str, SampleSet],
        test: dict[str, SampleSet],
        batch_size: int,
        eval_batch_size: int,
        workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, dict(val), dict(test)
        self.batch_size, self.eval_batch_size, self.workers, self.seed = (
            batch_size,
            eval_batch_size,
            workers,
            seed,
        )
        self._check_batch(1)
        self.collate: Collate | None = None
        self.eval_collate: Collate | None = None
        self.updates_per_batch = 1

    def connect(self, collate: Collate, eval_collate: Collate, updates_per_batch: int) -> None:
        """Set what the loaders need to know of the stage.

        Args:
            collate: makes training batches.
            eval_collate: makes validation and test batches.
            updates_per_batch: optimizer steps per training batch; a resumed run counts its batches with it.
        """
        self.collate, self.eval_collate = collate, eval_collate
        self.updates_per_batch = updates_per_batch

    def _check_batch(self, ranks: int) -> int:
        """Return the number of training samples. Raise ValueError if they do not fill one batch per rank."""
        length = len(self.train)
        if length < self.batch_size * ranks:
            fits = length // ranks
            way_out = f"set data.batch_size={fits}" if fits else "set trainer.devices to fewer ranks"
            raise ValueError(
                f"data.batch_size: must be at most {fits}, for {length} training samples on {ranks} rank(s); "
                f"got {self.batch_size} ({way_out})"
            )
        return length

    def _ranks(self) -> tuple[int, int]:
        """Return the index of this process and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _batches_done(self) -> int:
        """Return the number of batches that the run has consumed, from its number of updates."""
        assert self.trainer is not None
        return int(self.trainer.global_step) // self.updates_per_batch

    @property
    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return a shuffled loader of whole batches that starts at the run's position."""
        rank, ranks = self._ranks()
        length = self._check_batch(ranks)
        return DataLoader(
            cast("Dataset[Sample]", self.train),
            batch_size=self.batch_size,
            sampler=ResumableShuffle(length, self.batch_size, self.seed, rank, ranks, self._batches_done),
            num_workers=self.workers,
            collate_fn=self.collate,
            drop_last=True,
            pin_memory=self._on_gpu,
            persistent_workers=self.workers > 0,
            worker_init_fn=begin_worker,
        )

    def _eval_loaders(self, datasets: dict[str, SampleSet]) -> list[DataLoader[Sample]]:
        return [
            DataLoader(
                cast("Dataset[Sample]", dataset),
                batch_size=self.eval_batch_size,
                sampler=EvalShard(len(dataset), *self._ranks()),
                num_workers=self.workers,
                collate_fn=self.eval_collate,
                pin_memory=self._on_gpu,
                worker_init_fn=begin_worker,
            )
            for dataset in datasets.values()
        ]

    def val_dataloader(self) -> list[DataLoader[Sample]]:
        """Return one loader per validation set, in the order of `val`."""
        return self._eval_loaders(self.val)

    def test_dataloader(self) -> list[DataLoader[Sample]]:
        """Return one loader per test set, in the order of `test`."""
        return self._eval_loaders(self.test)
