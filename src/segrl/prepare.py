"""What is done to a dataset before a training.

`python -m segrl.prepare check data=NAME` tells whether a download is whole; `python -m segrl.prepare traces data.root=FOLDER
out=FILE.jsonl` writes chat traces from images and masks. Reads datasets as downloaded; moves, renames and deletes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from omegaconf import DictConfig, OmegaConf

from segrl import stopping
from segrl.folder import write
from segrl.front_door import check as check_all
from segrl.front_door import check_keys, enter

if TYPE_CHECKING:
    from segrl.data.survey import Survey
    from segrl.data.traces import Judged


def traces(cfg: DictConfig) -> None:
    """Write one JSON line per sample whose mask the mask head finds again from the trace's own prompt."""
    check_keys(cfg, "prepare_traces")
    out = _checked_out(cfg)
    check_all(cfg, "prepare_traces")
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from segrl.data.traces import Judged, written

    head_name = f"head={HydraConfig.get().runtime.choices['head']}"
    samples, head = instantiate(cfg.data.module.train), instantiate(cfg.head)
    partial, judged = out.with_name(f"{out.name}.partial"), Judged()
    with stopping.held(), _going_on(partial, _command(cfg, samples.ids), judged) as file:
        if judged.seen:
            print(f"  {judged.seen}/{len(samples)} were judged before", flush=True)
        grammar, annotator = instantiate(cfg.grammar), instantiate(cfg.annotator)
        for one in written(samples, head, grammar, annotator, cfg.least_iou, judged):
            if isinstance(one, dict):
                one |= {"image": os.path.relpath(one["image"], out.parent)}
            file.write(json.dumps(one) + "\n")
            file.flush()
            judged.add(one)
            if judged.seen % 100 == 0:
                print(f"  {judged.seen}/{len(samples)}, {len(judged.lines)} kept", flush=True)
            if (signum := stopping.asked()) is not None:
                stop = stopping.Stopped(signum)
                said = f"{judged.seen} of {len(samples)} samples are judged and kept in {partial}"
                print(f"stopped by {stop.name}; {said}; the same command goes on", flush=True)
                stop.told = True
                raise stop
        left_out = f"{judged.unsolved} below IoU {cfg.least_iou} as {head_name} draws them, {judged.empty} without an object"
        if not judged.lines:
            raise ValueError(
                f"least_iou: a mask head that finds masks again is needed; of {len(samples)} it found none ({left_out})"
            )
        write(out, "".join(json.dumps(line) + "\n" for line in judged.lines))
        partial.unlink()
        print(f"{len(judged.lines)} traces in {out}; left out: {left_out}")
    stopping.check()


def _command(cfg: DictConfig, ids: Sequence[str]) -> str:
    """The first line of a partial file: what was asked for, and of which samples."""
    parts = {
        part: OmegaConf.to_container(cfg[part], resolve=True)
        for part in ("data", "head", "grammar", "annotator")
    }
    said = json.dumps([parts, cfg.least_iou, str(cfg.out), list(ids)])
    return f"traces {hashlib.sha256(said.encode()).hexdigest()}"


@contextmanager
def _going_on(partial: Path, command: str, judged: Judged) -> Iterator[TextIO]:
    """Count in `judged` what a partial file holds, and open it to append; what is refused leaves none.

    Raises:
        ValueError: if it is of another command, or damaged.
    """
    whole = partial.read_bytes() if partial.is_file() else b""
    whole = whole[: whole.rfind(b"\n") + 1]  # what a kill cut off is judged again
    first, *rows = whole.decode(errors="replace").splitlines() or [command]
    try:
        for row in rows:
            judged.add(json.loads(row))
    except ValueError:
        first = ""
    if first != command:
        raise ValueError(
            f"out: {partial} must be of the same command to go on with; it is of another, or was changed "
            "(give the same command, or delete it to begin anew)"
        )
    made = [folder for folder in partial.parents if not folder.exists()]
    partial.parent.mkdir(parents=True, exist_ok=True)
    if whole:
        os.truncate(partial, len(whole))
    else:
        partial.write_text(f"{command}\n")
    try:
        with partial.open("a") as text:
            yield text
    except ValueError:
        partial.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
        raise


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
