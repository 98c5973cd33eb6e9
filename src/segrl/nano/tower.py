"""Warm up a vision tower with random weights: train it to predict the foreground and its box.

Published policies have a trained tower. A nano policy that is trained on chats alone predicts the mean box
for thousands of updates. After a few hundred updates of this stage, the same training uses the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segrl.data.collate import Collate
from segrl.geometry import tight_box
from segrl.models.hf_vlm import HFPolicy
from segrl.models.kernels.vision_tower import image_features
from segrl.protocols import Grammar
from segrl.stages.base import Optimization, Stage
from segrl.types import Batch


class TowerStage(Stage):
    """Trains the tower through two small read-outs, of the foreground per cell and of the box.

    Later stages do not use the read-outs.

    Args:
        policy: only its tower is trained.
        grammar: the grammar of later stages.
        image_tokens: number of features per image, the same for all images.
        optimization, seed: see `Stage`.
    """

    def __init__(
        self, *, policy: HFPolicy, grammar: Grammar, image_tokens: int, optimization: Optimization, seed: int
    ) -> None:
        super().__init__(optimization=optimization, seed=seed)
        self.keep_frozen = True  # checkpoints hold the whole policy, from which the next stage starts
        self.policy = policy.requires_grad_(False)
        self.tower.requires_grad_(True)
        width = policy.model.config.vision_config.out_hidden_size
        self.cell = nn.Linear(width, 1)
        self.box = nn.Sequential(nn.Linear(width * image_tokens, 128), nn.GELU(), nn.Linear(128, 4))
        self.collate = self.eval_collate = Collate(policy.encoder, grammar)

    @property
    def tower(self) -> Any:  # noqa: ANN401 - transformers has no type for both families' towers
        """The policy's vision tower. As a property, it adds no second name of its weights to checkpoints."""
        return self.policy.model.model.visual

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return cross-entropy of the foreground's share per cell, plus twice the L1 loss of the box."""
        features = torch.stack(list(image_features(self.policy.model.model, batch.prefixes).pooler_output))
        merge = self.tower.config.spatial_merge_size
        shares, boxes = [], []
        for sample, prefix in zip(batch.samples, batch.prefixes, strict=True):
            mask = torch.as_tensor(sample.mask, device=self.device).float()[None]
            _, height, width = prefix.grid[0].tolist()
            cells = (height // merge, width // merge)
            shares.append(F.adaptive_avg_pool2d(mask, cells).flatten())
            boxes.append(torch.as_tensor(tight_box(sample.mask), device=self.device))
        cell_loss = F.binary_cross_entropy_with_logits(self.cell(features)[..., 0], torch.stack(shares))
        box_loss = F.l1_loss(self.box(features.flatten(1)), torch.stack(boxes))
        self.remember({"tower/cell_loss": cell_loss.detach(), "tower/box_loss": box_loss.detach()})
        return cell_loss + 2 * box_loss
