"""Saliency and camouflage scores of a set: accumulate, synchronise, compute."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from segrl.metrics.functional.overlap import iou, mean_absolute_error
from segrl.metrics.functional.structure import structure

NAMES = ("iou", "structure", "mae", "fault_rate")


def score(mask: np.ndarray, truth: np.ndarray, faulty: bool) -> dict[str, float]:
    """Every score of one answer, by the names in `NAMES`; a faulty answer's mask is empty, and counts."""
    values = (iou(mask, truth), structure(mask, truth), mean_absolute_error(mask, truth), float(faulty))
    return dict(zip(NAMES, values, strict=True))


class SaliencyScores(Metric):
    """Means over samples of IoU, S-measure, MAE and the share of unparsable answers."""

    is_differentiable = False
    full_state_update = False
    totals: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: dict[str, float]) -> None:
        """Take in one sample's `score`."""
        self.totals += torch.tensor(
            [scores[name] for name in NAMES], dtype=torch.float64, device=self.totals.device
        )
        self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Each name's mean."""
        return dict(zip(NAMES, (self.totals / self.count).float(), strict=True))
