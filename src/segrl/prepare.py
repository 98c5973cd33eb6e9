"""`python -m segrl.prepare traces data.root=FOLDER out=FILE.jsonl`: chat traces from images and masks.

Reads datasets as downloaded; moves, renames and deletes nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from segrl.front_door import enter


def traces(cfg: DictConfig) -> None:
    """Write one JSON line per sample whose mask the mask head finds again from the trace's own prompt."""
    import numpy as np
    from hydra.utils import instantiate

    from segrl.metrics.functional.overlap import iou
    from segrl.prompts.frames import absolute_pixels

    out = Path(cfg.out)
    if out.suffix != ".jsonl" or out.exists():
        raise ValueError(f"out: a new .jsonl file is needed; got {out}{' (it exists)' * out.exists()}")
    samples, head = instantiate(cfg.data.module.train), instantiate(cfg.head)
    grammar, annotate = instantiate(cfg.grammar), instantiate(cfg.annotator)
    problem = next(part["text"] for part in grammar.messages(None)[-1]["content"] if part["type"] == "text")
    lines, empty, unsolved = [], 0, 0
    for index in range(len(samples)):
        sample = samples[index]
        if sample.path is None:
            raise ValueError(
                "data: samples that were read from files are needed to write traces of; these were drawn"
            )
        if not sample.mask.any():
            empty += 1
            continue
        frame = absolute_pixels(*sample.mask.shape)
        text = grammar.render(annotate(sample, np.random.default_rng(index)), frame)
        said = grammar.parse(text, frame)
        ((mask,),) = head.segment([sample.image], [[said.prompt]])
        if iou(mask, sample.mask) < cfg.least_iou:
            unsolved += 1
            continue
        image = os.path.relpath(sample.path, out.parent)
        solution = text.partition("</think>")[2].strip() or text
        lines.append({"image": image, "problem": problem, "thinking": said.thought, "solution": solution})
        if index % 100 == 99:
            print(f"  {index + 1}/{len(samples)}, {len(lines)} kept", flush=True)
    if not lines:
        raise ValueError(
            f"least_iou: the mask head must find a mask again; of {len(samples)} it found none at {cfg.least_iou}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_suffix(".part")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    beside.replace(out)
    print(
        f"{len(lines)} traces in {out}; left out: {unsolved} below IoU {cfg.least_iou}, {empty} without an object"
    )


def main() -> None:
    """Entry point."""
    jobs = {"traces": traces}
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        print(
            f"segrl: prepare: one of {', '.join(jobs)} is needed: python -m segrl.prepare traces --help",
            file=sys.stderr,
        )
        sys.exit(2)
    job = sys.argv.pop(1)
    enter(f"prepare_{job}", jobs[job])


if __name__ == "__main__":
    main()
