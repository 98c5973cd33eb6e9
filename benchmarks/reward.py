"""The reward of one step, beside the way in which Seg-R1's released code computes it, on the same
completions.

`python benchmarks/reward.py` prints one JSON line: CPU seconds of a group of 8 completions with one box each
on one 768x768 image, with SAM 2.1 tiny (random weights: time does not depend on them), one thread.

Released: build SAM 2 and load its checkpoint in the reward, encode the image for every box, decode one prompt
at a time, S-measure in float64 by pysodmetrics' algorithm written in NumPy as published. Ours: a head that
stays loaded, one encoding (none where it was cached, or begun while the policy decoded), one batched decode.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from segrl.metrics.functional.structure import structure
from segrl.models.sam2_head import Sam2Head
from segrl.types import MaskPrompt

ARCHITECTURE, SIDE, GROUP = "configs/sam2.1/sam2.1_hiera_t.yaml", 768, 8


def object_score(values: np.ndarray) -> float:
    """Return the object score as released, in float64."""
    mean, deviation = values.mean(), values.std()
    return float(2 * mean / (mean * mean + 1 + deviation + 1e-20))


def similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the similarity as released, in float64."""
    n, x, y = mask.size, mask.mean(), truth.mean()
    both = ((mask - x) * (truth - y)).sum() / (n - 1)
    spread = ((mask - x) ** 2).sum() / (n - 1) + ((truth - y) ** 2).sum() / (n - 1)
    above, below = 4 * x * y * both, (x * x + y * y) * spread
    return above / (below + 1e-20) if above else float(below == 0)


def s_measure(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the S-measure of Fan et al. (ICCV 2017) in float64, as the released reward computes it."""
    mask, truth = mask.astype(np.float64), truth.astype(np.float64)
    share = truth.mean()
    objects = share * object_score(mask[truth == 1]) + (1 - share) * object_score(1 - mask[truth == 0])
    rows, columns = np.nonzero(truth)
    y, x = round(rows.mean()) + 1, round(columns.mean()) + 1
    parts = [
        (slice(None, y), slice(None, x)),
        (slice(None, y), slice(x, None)),
        (slice(y, None), slice(None, x)),
        (slice(y, None), slice(x, None)),
    ]
    regions = sum(truth[p].size / truth.size * similarity(mask[p], truth[p]) for p in parts)
    return float(0.5 * objects + 0.5 * regions)


def released(checkpoint: Path, image: np.ndarray, boxes: np.ndarray, truth: np.ndarray) -> list[float]:
    """Compute Seg-R1's `segmentation_reward`: load everything anew, one box at a time."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    head = Sam2Head(ARCHITECTURE, str(checkpoint), 1, 0, None)
    predictor, rewards = SAM2ImagePredictor(head.model), []
    for box in boxes:
        predictor.set_image(image)
        masks, _, _ = predictor.predict(box=box * SIDE, multimask_output=False)
        mask = masks[0] > 0
        union = (mask | truth).sum()
        rewards.append(0.7 * (mask & truth).sum() / max(union, 1) + 0.3 * s_measure(mask, truth))
    return rewards


def ours(head: Sam2Head, image: np.ndarray, boxes: np.ndarray, truth: np.ndarray) -> list[float]:
    """Segment the group, score each mask."""
    (masks,) = head.segment([image], [[MaskPrompt.of([box]) for box in boxes]])
    return [
        0.7 * (mask & truth).sum() / max((mask | truth).sum(), 1) + 0.3 * structure(mask, truth)
        for mask in masks
    ]


def main() -> None:
    """Measure one group, both ways."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    truth = np.zeros((SIDE, SIDE), bool)
    truth[200:500, 250:600] = True
    corners = rng.uniform(0.05, 0.4, (GROUP, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.2, 0.5, (GROUP, 2))], 1).astype(np.float32)
    head = Sam2Head(ARCHITECTURE, None, 32, 8, None)
    checkpoint = Path(tempfile.mkdtemp()) / "tiny.pt"
    torch.save({"model": head.model.state_dict()}, checkpoint)
    seconds, rewards = {}, {}
    for name, run in (
        ("ours", lambda: ours(head, image, boxes, truth)),
        ("ours, remembered", lambda: ours(head, image, boxes, truth)),
        ("released", lambda: released(checkpoint, image, boxes, truth)),
    ):
        began = time.process_time()
        rewards[name] = run()
        seconds[name] = round(time.process_time() - began, 2)
    difference = float(np.abs(np.array(rewards["ours"]) - rewards["released"]).max())
    print(json.dumps({
        "case": "reward of a group", "group": GROUP, "side": SIDE, "head": "SAM 2.1 tiny",
        "cpu_seconds": seconds, "ratio": round(seconds["released"] / seconds["ours"], 1),
        "ratio_remembered": round(seconds["released"] / seconds["ours, remembered"], 1),
        "largest_difference_of_rewards": difference,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
