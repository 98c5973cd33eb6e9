"""Check the files of datasets and their published numbers of samples, for `segrl.prepare check`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from segrl.host.files import write_whole
from segrl.runs.configuration import check as check_all
from segrl.runs.schema.sources import absent

if TYPE_CHECKING:
    from segrl.data.survey import Survey


def _surveyed(node: DictConfig) -> Survey:
    """Return the survey of a node's dataset: the whole split, whatever a run draws of it, and its faults."""
    from hydra.utils import get_class, instantiate

    from segrl.data.survey import ItemDataset

    loader = get_class(node._target_)
    if not issubclass(loader, ItemDataset):
        raise ValueError(f"data: must be a dataset of files to check; {loader.__name__} has none")
    survey: Survey = instantiate(node, _target_=f"{node._target_}.survey", **loader.whole_split)
    return survey


def _splits(cfg: DictConfig) -> dict[str, tuple[DictConfig, int | None]]:
    """Return by name the node of every chosen split, and the published number of samples, None if unknown.

    Raises:
        ValueError: if no split is chosen, a value is missing, or a root does not exist.
    """
    splits: dict[str, tuple[DictConfig, int | None]] = {}
    data = OmegaConf.select(cfg, "data")
    if data is not None:
        if missing := OmegaConf.missing_keys(cfg):  # includes keys that refer to it, which lie deeper
            raise ValueError(
                f"{min(sorted(missing), key=lambda key: key.count('.'))}: must be given; it is not set"
            )
        for key, owners in cfg.sources.items():
            if (path := OmegaConf.select(cfg, key)) is not None and not Path(path).exists():
                raise ValueError(absent(key, path, owners))
        nodes = {"train": data.module.train, **(data.module.val or {}), **(data.module.test or {})}
        splits |= {name: (node, OmegaConf.select(data, f"published.{name}")) for name, node in nodes.items()}
    for name, one in cfg.testsets.items():
        if not Path(one.root).exists():
            raise ValueError(absent(f"testsets.{name}.root", one.root, one.source))
        splits[name] = (one.samples, one.published)
    if not splits:
        raise ValueError(
            "data: must be given, or testset; none is set (data=NAME, testset=NAME or testset=[NAME,...])"
        )
    return splits


def check(cfg: DictConfig) -> None:
    """Print a report on the chosen datasets, and write it to `out` if set.

    Exit with 1 if scores on them would not be comparable: an image or a mask has no partner, a file cannot be
    read, or the number of samples is not the published one.
    """
    check_all(cfg, "prepare_check")
    from segrl.data.check import check as walk

    splits = _splits(cfg)
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ValueError(f"out: must be a .json file in a folder that exists; got {out}")
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
        write_whole(out, json.dumps(report.as_json(), indent=2) + "\n")
    if report.wrong:
        sys.exit(1)
