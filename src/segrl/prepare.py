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
from segrl.front_door import check as check_all
from segrl.front_door import check_keys, enter

if TYPE_CHECKING:
    from segrl.data.survey import Survey


def traces(cfg: DictConfig) -> None:
    """Write one JSON line per sample whose mask the mask head finds again from the trace's own prompt."""
    check_keys(cfg, "prepare_traces")
    out = _checked_out(cfg)
    check_all(cfg, "prepare_traces")
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from segrl.data.traces import Judged, written

    samples, head = instantiate(cfg.data.module.train), instantiate(cfg.head)
    judged = Judged()
    for line in written(
        samples, head, instantiate(cfg.grammar), instantiate(cfg.annotator), cfg.least_iou, judged
    ):
        judged.lines.append({**line, "image": os.path.relpath(str(line["image"]), out.parent)})
        if judged.seen % 100 == 0:
            print(f"  {judged.seen}/{len(samples)}, {len(judged.lines)} kept", flush=True)
    left_out = f"{judged.unsolved} below IoU {cfg.least_iou} as head={HydraConfig.get().runtime.choices['head']} draws them, {judged.empty} without an object"
    if not judged.lines:
        raise ValueError(
            f"least_iou: a mask head that finds masks again is needed; of {len(samples)} it found none ({left_out})"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, "".join(json.dumps(line) + "\n" for line in judged.lines))
    print(f"{len(judged.lines)} traces in {out}; left out: {left_out}")


def _checked_out(cfg: DictConfig) -> Path:
    """The file to write; ValueError naming the key of what cannot be."""
    out = Path(str(cfg.out))
    if out.suffix != ".jsonl" or out.is_dir():
        raise ValueError(f"out: a .jsonl file is needed; got {out}")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"out: a new .jsonl file is needed; {out} exists (overwrite=true writes it anew)")
    return out


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
    check_all(cfg, "prepare_check")
    from segrl.data.check import check as walk

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
    keys = [argument.lstrip("+").split("=")[0] for argument in sys.argv[1:]]
    if job == "check" and "data" not in keys and any(key.startswith("data.") for key in keys):
        print(
            "segrl: data: a dataset to check is needed beside data.*: data=NAME, or data=image_mask for folders of your own",
            file=sys.stderr,
        )
        sys.exit(2)
    enter(f"prepare_{job}", jobs[job])


if __name__ == "__main__":
    main()
