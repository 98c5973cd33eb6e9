"""Print the mean IoU of a demo run's answers, before and after training, with and without their points.

python without_points.py RUN_FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import OmegaConf

from segrl.runs.configuration import register_resolvers
from segrl.types import MaskPrompt

register_resolvers()
run = Path(sys.argv[1])
cfg = OmegaConf.load(run / "config.yaml")
head, (scenes,) = instantiate(cfg.head), instantiate(cfg.data.module).test.values()
samples = [scenes[i] for i in range(len(scenes))]
for name in ("before", "after"):
    rows = [json.loads(line) for line in (run / "evaluation" / f"{name}.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    iou: dict[str, list[float]] = {"as it is": [], "without points": []}
    for row, sample in zip(rows, samples, strict=True):
        prompts = [MaskPrompt.of(row["boxes"], row["points"], row["labels"]), MaskPrompt.of(row["boxes"])]
        for values, mask in zip(iou.values(), head.segment([sample.image], [prompts])[0], strict=True):
            values.append((mask & sample.mask).sum() / max((mask | sample.mask).sum(), 1))
    places = {json.dumps(row["points"]) for row in rows}
    inside = sum(
        any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in row["boxes"])
        for row in rows
        for x, y in row["points"][:1]
    )
    means = {what: round(float(np.mean(values)), 3) for what, values in iou.items()}
    print(
        json.dumps({"scenes": name, "iou": means, "places of points": len(places), "points in a box": inside})
    )
