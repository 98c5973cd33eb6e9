"""One datamodule for all datasets: which are for training, which for validation, which for the final test."""

from __future__ import annotations

from typing import cast

import lightning
from torch.utils.data import DataLoader, Dataset

from segrl.data.collate import Collate, Share, Shuffled
from segrl.host import signals
from segrl.protocols import SampleSet
from segrl.types import Sample


def begin_worker(worker: int) -> None:
    """Make a loader process one that neither outlives its run nor ends before it."""
    signals.leave_to_parent()


class SegDataModule(lightning.LightningDataModule):
    """Loaders over datasets of samples.

    Args:
        train: what the stage learns from.
        val: by name, watched during training; `val/<name>/<metric>`.
        test: by name, scored before and after training.
        batch_size: samples (not completions) of one update, per rank.
        eval_batch_size: samples of one evaluation step, per rank.
        workers: loader processes per loader; 0 loads in the training process.
        seed: of the order.
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
        """Say how samples become batches, and how many updates a batch makes; the stage knows."""
        self.collate, self.eval_collate = collate, eval_collate
        self.updates_per_batch = updates_per_batch

    def _check_batch(self, ranks: int) -> int:
        """Number of training samples; raises ValueError if they do not fill one batch."""
        length = len(self.train)
        if length < self.batch_size * ranks:
            fits = length // ranks
            way_out = f"set data.batch_size={fits}" if fits else "fewer ranks are needed (trainer.devices)"
            raise ValueError(
                f"data.batch_size: at most {fits} fit the {length} training samples on {ranks} rank(s); "
                f"got {self.batch_size} ({way_out})"
            )
        return length

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _batches_done(self) -> int:
        """Of the run so far: its updates, by those that a batch makes."""
        assert self.trainer is not None
        return int(self.trainer.global_step) // self.updates_per_batch

    @property
    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, whole batches only, from where the run stands."""
        rank, ranks = self._ranks()
        length = self._check_batch(ranks)
        return DataLoader(
            cast("Dataset[Sample]", self.train),
            batch_size=self.batch_size,
            sampler=Shuffled(length, self.batch_size, self.seed, rank, ranks, self._batches_done),
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
                sampler=Share(len(dataset), *self._ranks()),
                num_workers=self.workers,
                collate_fn=self.eval_collate,
                pin_memory=self._on_gpu,
                worker_init_fn=begin_worker,
            )
            for dataset in datasets.values()
        ]

    def val_dataloader(self) -> list[DataLoader[Sample]]:
        """One loader per validation set, in order of their names' appearance."""
        return self._eval_loaders(self.val)

    def test_dataloader(self) -> list[DataLoader[Sample]]:
        """One loader per test set."""
        return self._eval_loaders(self.test)
