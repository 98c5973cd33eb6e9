"""Train a mask head from random weights on scenes with known masks: the stage that made the nano SAM 2.

The loss follows SAM 2 (arXiv 2408.00714, appendix D.2, without video), with cross-entropy in place of focal
loss: L = m(single mask) + min of m over the three other masks + squared error of the predicted IoUs, where
m = 4 cross-entropy + Dice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segrl.geometry import components, tight_box
from segrl.metrics.functional.overlap import iou
from segrl.models.sam2_head import Sam2Head
from segrl.stages.base import Optimization, Stage
from segrl.types import Batch, MaskPrompt

# (has a box, foreground points, background points); repeated ones are drawn more often.
_SHAPES = (
    (True, 0, 0), (True, 0, 0), (True, 1, 0), (True, 1, 0), (True, 2, 0), (True, 1, 1),
    (False, 1, 0), (False, 2, 1), (False, 3, 2),
)  # fmt: skip

_FITS = 0.4  # smallest IoU of a box and an object's own box at which the box names that object


def _pick(rng: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """Return `count` random unit points at centres of true pixels, float32 `[count, 2]`."""
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(0, len(rows), count)
    return np.stack(
        [(columns[chosen] + 0.5) / mask.shape[1], (rows[chosen] + 0.5) / mask.shape[0]], 1
    ).astype(np.float32)


def _prompt(
    rng: np.random.Generator, mask: np.ndarray, shape: tuple[bool, int, int], jitter: float
) -> MaskPrompt:
    """Return a prompt of the given shape for a mask bool `[H, W]`.

    Each side of the box is moved by up to `jitter` of the box's extent.
    """
    has_box, inside, outside = shape
    box = tight_box(mask)
    moved = box + np.tile(box[2:] - box[:2], 2) * rng.uniform(-jitter, jitter, 4)
    points = np.concatenate([_pick(rng, mask, inside), _pick(rng, ~mask, outside)])
    return MaskPrompt.of([np.clip(moved, 0, 1)] if has_box else [], points, [1] * inside + [0] * outside)


def _held(box: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return bool `[H, W]`, true on pixels whose centres lie in a unit box."""
    y, x = ((np.arange(side) + 0.5) / side for side in size)
    return np.outer((y >= box[1]) & (y <= box[3]), (x >= box[0]) & (x <= box[2]))


def _astray(
    rng: np.random.Generator, mask: np.ndarray, parts: list[np.ndarray], shape: tuple[bool, int, int]
) -> tuple[MaskPrompt, np.ndarray]:
    """Return a prompt with a random box, and its target mask.

    The target is the part whose own box has the largest IoU with the random box, if that is at least `_FITS`,
    else the whole area of the box. Without such targets, a head would find the object in any large box and
    so reward a policy for boxing the whole image.
    """
    _, inside, outside = shape
    corner = rng.uniform(0, 0.8, 2)
    box = np.concatenate([corner * rng.integers(0, 2, 2), corner + rng.uniform(0.15, 1.0, 2)])
    held = _held(np.clip(box, 0, 1).astype(np.float32), mask.shape)
    fits = [iou(_held(tight_box(part), mask.shape), held) for part in parts]
    best = int(np.argmax(fits))
    answer = parts[best] if fits[best] >= _FITS else held
    points = np.concatenate([_pick(rng, answer & held, inside), _pick(rng, ~mask, outside)])
    prompt = MaskPrompt.of([np.clip(box, 0, 1)], points, [1] * inside + [0] * outside)
    return prompt, answer


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return 4 times cross-entropy plus Dice loss, per mask `[M, C]`.

    Args:
        logits: `[M, C, h, w]`.
        truth: `[M, 1, h, w]`, share of true pixels in each cell.
    """
    target = truth.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((2, 3))
    found = logits.sigmoid()
    dice = 1 - (2 * (found * target).sum((2, 3)) + 1) / (found.sum((2, 3)) + target.sum((2, 3)) + 1)
    return entropy * 4 + dice


class MaskHeadStage(Stage):
    """Trains a mask head on prompts of random shape for known masks.

    Args:
        head: is trained; in all other stages it is frozen.
        jitter: sides of boxes are moved by up to this share of the box's extent.
        astray: probability that a box is random instead; see `_astray`.
        optimization, seed: see `Stage`.
    """

    def __init__(
        self, *, head: Sam2Head, jitter: float, astray: float, optimization: Optimization, seed: int
    ) -> None:
        super().__init__(optimization=optimization, seed=seed)
        self.head, self.jitter, self.astray = head.requires_grad_(True), jitter, astray
        # Embeddings change with every update, so none are cached.
        self.head.embeddings.kept, self.head.embeddings.folder = 0, None
        self.found: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one prompt per image, all of one random shape."""
        rng = np.random.default_rng(self.noise_seed(self.global_rank))
        shape = _SHAPES[int(rng.integers(len(_SHAPES)))]
        questions = [self._question(rng, sample.mask, shape) for sample in batch.samples]
        prompts, truths = [prompt for prompt, _ in questions], [truth for _, truth in questions]
        features = self.head.embed(self.head.preprocess([s.image for s in batch.samples]))
        logits, predicted = self.head.decode_all(features, prompts)
        target = torch.as_tensor(np.stack(truths), device=self.device).float()[:, None]
        losses = mask_loss(logits, F.interpolate(target, logits.shape[2:], mode="area"))
        sharp = F.interpolate(logits.detach(), target.shape[2:], mode="bilinear", align_corners=False) > 0
        union = (sharp | (target > 0.5)).sum((2, 3))
        overlap = torch.where(union > 0, (sharp & (target > 0.5)).sum((2, 3)) / union.clamp_min(1), 1.0)
        quality = F.mse_loss(predicted, overlap)
        loss = losses[:, 0].mean() + losses[:, 1:].min(1).values.mean() + quality
        self.remember(
            {
                "head/loss": loss.detach(),
                "head/iou": overlap[:, 0].mean(),
                "head/quality_loss": quality.detach(),
            }
        )
        return loss

    def _question(
        self, rng: np.random.Generator, mask: np.ndarray, shape: tuple[bool, int, int]
    ) -> tuple[MaskPrompt, np.ndarray]:
        """Return a prompt of the given shape and its target mask."""
        parts = components(mask, least=0.005, most=3)
        if shape[0] and rng.random() < self.astray:
            return _astray(rng, mask, parts, shape)
        part = parts[int(rng.integers(len(parts)))]
        return _prompt(rng, part, shape, self.jitter), part

    def on_validation_epoch_start(self) -> None:
        """Drop the scores of the last validation."""
        self.found = []

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score the masks that the ground truth's boxes give, by IoU."""
        prompts = [
            [MaskPrompt.of([tight_box(p) for p in components(s.mask, 0.005, 8)])] for s in batch.samples
        ]
        masks = self.head.segment([s.image for s in batch.samples], prompts)
        self.found += [iou(mask, s.mask) for (mask,), s in zip(masks, batch.samples, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Log the mean IoU."""
        self.log("val/true_box/iou", float(np.mean(self.found)))
