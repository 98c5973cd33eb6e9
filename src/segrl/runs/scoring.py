"""Score answers while Lightning tests a stage, on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch

from segrl.data.datamodule import SegDataModule
from segrl.metrics.saliency import BRIEF, brief
from segrl.protocols import SampleSet
from segrl.runs.records import row
from segrl.types import Answer, Batch, Sample

DRAWN = 8  # samples of the first test set that the picture shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One evaluated sample, as it is saved."""

    line: dict[str, Any]
    """Its line of JSON; see `records.row`."""
    mask: np.ndarray | None
    """bool `[H, W]` for the first samples of the first set, which the picture shows; else None."""


Rows = dict[str, list[Row]]
"""dataset -> rows in the dataset's order."""


class Scoring(lightning.Callback):
    """Callback that keeps a row of every answer that `SegStage.test_step` returns."""

    def __init__(self) -> None:
        self.rows: Rows = {}

    def on_test_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reset the rows."""
        data: SegDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.rows = {name: [] for name in data.test}

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own union
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the answers of a batch."""
        name = list(self.rows)[dataloader_idx]
        for sample, answer in zip(batch.samples, outputs["answers"], strict=True):
            self.rows[name].append(self._row(name, sample, answer))

    def _row(self, name: str, sample: Sample, answer: Answer) -> Row:
        parts = {part: value for part, value in brief(answer, sample).items() if part != "fault_rate"}
        line = row(name, sample, answer, parts, BRIEF, None)
        shown = name == next(iter(self.rows)) and len(self.rows[name]) < DRAWN
        return Row(line=line, mask=answer.mask if shown else None)

    def everywhere(self, sets: Mapping[str, SampleSet]) -> Rows:
        """Return the rows of all ranks in the order of the datasets, on every rank, and forget them here."""
        shares = [self.rows]
        if torch.distributed.is_initialized():
            shares = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(shares, self.rows)
        self.rows = {}
        found = {name: {row.line["id"]: row for share in shares for row in share[name]} for name in sets}
        return {name: [found[name][one] for one in samples.ids] for name, samples in sets.items()}
