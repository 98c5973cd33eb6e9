"""What is done to a dataset before a training.

`python -m segrl.prepare check data=NAME` tells whether a download is whole; `python -m segrl.prepare traces data.root=FOLDER
out=FILE.jsonl` writes chat traces from images and masks. Reads datasets as downloaded; moves, renames and deletes nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from segrl.folder import write
from segrl.front_door import enter

if TYPE_CHECKING:
    from segrl.data.survey import Survey


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
    write(out, "".join(json.dumps(line) + "\n" for line in lines))
    print(
        f"{len(lines)} traces in {out}; left out: {unsolved} below IoU {cfg.least_iou}, {empty} without an object"
    )


def _surveyed(node: DictConfig) -> Survey:
    """What the dataset of a node is made of, without building it: a loader refuses what is to be told here."""
    from hydra.utils import get_class, instantiate

    from segrl.data.survey import OnDisk

    loader = get_class(node._target_)
    if not issubclass(loader, OnDisk):
        raise ValueError(f"data: a dataset of files is needed to check; {loader.__name__} has none")
    survey: Survey = instantiate(node, _target_=f"{node._target_}.survey")
    return survey


def _splits(cfg: DictConfig) -> dict[str, tuple[DictConfig, int | None]]:
    """By name, the node of every split that is asked for, and how many samples its owners publish.

    Raises:
        ValueError: if none is asked for, or a root is not there.
    """
    splits: dict[str, tuple[DictConfig, int | None]] = {}
    data = OmegaConf.select(cfg, "data")
    if data is not None:
        if missing := OmegaConf.missing_keys(cfg):  # and all that refers to it, which lies deeper
            raise ValueError(
                f"{min(sorted(missing), key=lambda key: key.count('.'))}: a value is needed; none is set"
            )
        for key, owners in cfg.sources.items():
            if (path := OmegaConf.select(cfg, key)) is not None and not Path(path).exists():
                raise ValueError(f"{key}: there is no {path}; its owners publish it at {owners}")
        nodes = {"train": data.module.train, **(data.module.val or {}), **(data.module.test or {})}
        splits |= {name: (node, OmegaConf.select(data, f"published.{name}")) for name, node in nodes.items()}
    for name, one in cfg.testsets.items():
        if not Path(one.root).exists():
            raise ValueError(
                f"testsets.{name}.root: there is no {one.root}; its owners publish it at {one.source}"
            )
        splits[name] = (one.samples, one.published)
    if not splits:
        raise ValueError(
            "data: a dataset to check is needed: data=NAME, testset=NAME or testset=[NAME,...]; none is set"
        )
    return splits


def check(cfg: DictConfig) -> None:
    """Print what is wrong and what is worth knowing about a dataset on the disk; exit with 1 if numbers of it would not be its own."""
    from segrl.data.check import check as walk

    if isinstance(cfg.threads, bool) or not isinstance(cfg.threads, int) or cfg.threads < 1:
        raise ValueError(f"threads: at least 1 is needed; got {cfg.threads}")
    splits = _splits(cfg)
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ValueError(f"out: a .json file in a folder that exists is needed; got {out}")
    surveys = {name: _surveyed(node) for name, (node, _) in splits.items()}
    published = {name: count for name, (_, count) in splits.items()}
    report = walk(
        surveys, published, lambda line: print(f"  {line}", file=sys.stderr, flush=True), cfg.threads
    )
    if (licence := OmegaConf.select(cfg, "data.licence")) is not None:
        report.licences["data"] = licence
    report.licences |= {name: one.licence for name, one in cfg.testsets.items()}
    print("\n".join(report.lines()))
    if out is not None:
        write(out, json.dumps(report.as_json(), indent=2) + "\n")
    if report.wrong:
        sys.exit(1)


def main() -> None:
    """Entry point."""
    jobs = {"traces": traces, "check": check}
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
        return
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        print(
            f"segrl: prepare: one of {', '.join(jobs)} is needed: python -m segrl.prepare check --help",
            file=sys.stderr,
        )
        sys.exit(2)
    job = sys.argv.pop(1)
    enter(f"prepare_{job}", jobs[job])


if __name__ == "__main__":
    main()
