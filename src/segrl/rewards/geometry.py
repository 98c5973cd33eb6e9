"""Rewards of boxes and points, as Seg-Zero and VisionReasoner pay them; they need no mask head.

Both measure in pixels of an 840-pixel square; here a tolerance is a share of the image's side (10 / 840). The
true objects are `Sample.objects`; if that is None, the whole mask is one object.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from scipy.optimize import linear_sum_assignment

from segrl.geometry import inner_point, tight_box
from segrl.types import Answer, MaskPrompt, Sample


def objects_of(sample: Sample) -> list[np.ndarray]:
    """Return the sample's objects that are not empty, each bool `[H, W]`."""
    if sample.objects is not None:
        return [mask for mask in sample.objects if mask.any()]
    return [sample.mask] if sample.mask.any() else []


def two_points(mask: np.ndarray) -> np.ndarray:
    """Return unit centres float32 `[2, 2]` of the largest inscribed circle and of a second one far from it.

    The second is the largest circle in the half of the mask's pixels that is farther from the first centre.
    If that half is empty, the first centre is returned twice. Source: Seg-Zero's data preparation.
    """
    first = inner_point(mask)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    far = np.hypot((x + 0.5) / mask.shape[1] - first[0], (y + 0.5) / mask.shape[0] - first[1])
    half = mask & (far > np.median(far[mask]))
    return np.stack([first, inner_point(half) if half.any() else first])


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU `[m, n]` of boxes `[m, 4]` and `[n, 4]`."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = (a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1)[None]
    return np.asarray(both / np.maximum(areas - both, 1e-12))


def _paid_prompt(answer: Answer) -> MaskPrompt | None:
    """Return the mask prompt, or None for a fault or a loose answer: the released parsers refuse both."""
    return None if answer.parsed.loose else answer.parsed.prompt


def _single(answer: Answer, sample: Sample) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the answer's first box and the box around all true objects, or None if either is missing."""
    prompt, objects = _paid_prompt(answer), objects_of(sample)
    if prompt is None or not len(prompt.boxes) or not objects:
        return None
    return prompt.boxes[0], tight_box(np.logical_or.reduce(objects))


def box_overlaps(answer: Answer, sample: Sample, *, threshold: float) -> float:
    """Return 1 if the box's IoU with the true box is above the threshold (Seg-Zero: 0.5), else 0."""
    boxes = _single(answer, sample)
    if boxes is None:
        return 0.0
    return float(box_iou(boxes[0][None], boxes[1][None])[0, 0] > threshold)


def box_is_near(answer: Answer, sample: Sample, *, tolerance: float) -> float:
    """Return 1 if the mean absolute error of the box's four coordinates is below `tolerance`, else 0.

    Seg-Zero: 10 pixels of 840.
    """
    boxes = _single(answer, sample)
    return 0.0 if boxes is None else float(np.abs(boxes[0] - boxes[1]).mean() < tolerance)


def points_are_near(answer: Answer, sample: Sample, *, tolerance: float) -> float:
    """Return 1 if both points lie in the answer's box and near the two true points, else 0.

    Near means that their mean distance, in the better of the two orders, is below `tolerance` (Seg-Zero: 100
    pixels of 840).
    """
    prompt, boxes = _paid_prompt(answer), _single(answer, sample)
    if prompt is None or boxes is None or len(prompt.points) != 2:
        return 0.0
    box = boxes[0]
    inside = ((prompt.points >= box[:2]) & (prompt.points <= box[2:])).all()
    truth = two_points(np.logical_or.reduce(objects_of(sample)))
    distance = min(
        float(np.linalg.norm(prompt.points[list(order)] - truth, axis=1).mean())
        for order in permutations(range(2))
    )
    return float(inside and distance < tolerance)


def matched(
    answer: Answer, sample: Sample, *, overlap: float, box_tolerance: float, point_tolerance: float
) -> float:
    """Return the mean reward per object, 0 to 3: a point each for box overlap, near box and near point.

    Answered and true objects are matched for the highest sum (Hungarian algorithm), which is divided by the
    larger number of objects. Source: VisionReasoner (arXiv 2505.12081, section 3.3). No true and no answered
    object pays 3 here; the released code pays 0.

    Args:
        answer: to be paid; box k and point k are one object.
        sample: with the true objects.
        overlap: IoU above which a box overlaps (0.5).
        box_tolerance: mean coordinate error below which a box is near (10 pixels of 840).
        point_tolerance: distance below which a point inside its own box is near (30 pixels of 840).
    """
    prompt, objects = _paid_prompt(answer), objects_of(sample)
    if prompt is None or len(prompt.boxes) != len(prompt.points):
        return 0.0
    if not objects or not len(prompt.boxes):
        return 3.0 if len(objects) == len(prompt.boxes) else 0.0
    boxes = np.stack([tight_box(mask) for mask in objects])
    points = np.stack([inner_point(mask) for mask in objects])
    said, at = prompt.boxes, prompt.points
    inside = np.asarray((at >= said[:, :2]) & (at <= said[:, 2:])).all(1, keepdims=True)
    worth = (
        (box_iou(said, boxes) > overlap).astype(float)
        + (np.abs(said[:, None] - boxes[None]).mean(-1) < box_tolerance)
        + ((np.linalg.norm(at[:, None] - points[None], axis=-1) < point_tolerance) & inside)
    )
    rows, columns = linear_sum_assignment(-worth)
    return float(worth[rows, columns].sum() / max(worth.shape))
