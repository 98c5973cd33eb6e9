"""One evaluation, from a checked configuration to its table: every sample once, whatever happens on the way."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TextIO, cast

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from segrl.data.batching import Collate
from segrl.metrics.parts import Family, Parts, Score, scores
from segrl.protocols import SampleSet
from segrl.running import quiet, run_folder, say
from segrl.segmenter import Segmenter
from segrl.tracking.checkpoints import read_checkpoint
from segrl.tracking.figures import Cell, sheet
from segrl.tracking.mlflow_runs import keep
from segrl.tracking.provenance import provenance
from segrl.types import Answer, Sample

_PARTS = "per_sample.parts"  # one file per process and attempt; joined when all samples are there
_SECONDS = 5.0  # between two lines of progress


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """Everything of one evaluation, built; nothing is on the disk before all of it could be built."""

    cfg: DictConfig
    folder: Path
    segmenter: Segmenter
    family: Family
    sets: dict[str, SampleSet]
    fabric: Fabric
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def build(cls, cfg: DictConfig) -> Evaluation:
        """Instantiate policy, mask head and test sets. Raises ValueError on what does not fit."""
        quiet()
        torch.manual_seed(cfg.seed)
        folder = Path(cfg.resume) if cfg.resume else run_folder(Path(cfg.paths.run))
        cfg.paths.run = str(folder)
        sets = _test_sets(cfg)
        family: Family = instantiate(cfg.scores)
        policy = instantiate(cfg.policy)
        if cfg.init_from is not None:
            weights = read_checkpoint(Path(cfg.init_from))["state_dict"]
            learned = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
            if not learned:
                raise ValueError(
                    f"init_from: a checkpoint that holds a policy is needed; {cfg.init_from} holds none"
                )
            try:
                policy.take_over(learned)
            except ValueError as error:
                raise ValueError(
                    f"init_from: a policy of this architecture is needed; {cfg.init_from} has another ({error})"
                ) from None
        segmenter = Segmenter(
            policy.eval(), instantiate(cfg.grammar), instantiate(cfg.rollout), instantiate(cfg.head)
        )
        trainer = cfg.trainer
        try:
            fabric = Fabric(
                accelerator=trainer.accelerator, devices=trainer.devices, num_nodes=trainer.get("num_nodes", 1),
                precision=trainer.precision, strategy="auto" if trainer.devices == 1 else "ddp",
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:  # a device or a precision that is not there
            raise ValueError(f"trainer: {error}") from None
        return cls(cfg=cfg, folder=folder, segmenter=segmenter, family=family, sets=sets, fabric=fabric)

    def run(self) -> float | None:
        """Segment what is left, score everything, print the table; the value that a sweep compares comes back."""
        self.fabric.launch()
        for module in (self.segmenter.policy, self.segmenter.head):
            cast("torch.nn.Module", module).to(self.fabric.device)
        logger = None
        if self.fabric.is_global_zero:
            text = OmegaConf.to_yaml(self.cfg)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(text)
            logger = instantiate(self.cfg.logger)(self.folder, provenance(text))
            say(
                f"{self.cfg.suite.name}: {sum(map(len, self.sets.values()))} samples; results in {self.folder}"
            )
        self.fabric.barrier()
        for name, samples in self.sets.items():
            self._segment(name, samples)
        self.fabric.barrier()
        if not self.fabric.is_global_zero:
            return None
        metrics = self._conclude()
        kept = ("metrics.json", "per_sample.jsonl", "config.yaml", "overlays", "masks")
        keep(logger, [self.folder / name for name in kept], metrics)
        if logger is not None:
            logger.finalize("success")
        say(f"results in {self.folder}")
        return metrics.get(self.cfg.objective_metric or "")

    @torch.inference_mode()
    def _segment(self, name: str, samples: SampleSet) -> None:
        """This rank's share of what nobody has segmented yet; a line on the disk per sample."""
        done, ids = {row["id"] for row in _lines(self.folder, name)}, samples.ids
        self.fabric.barrier()  # all ranks have seen the same lines before one writes another
        left = [i for i, one in enumerate(ids) if one not in done][
            self.fabric.global_rank :: self.fabric.world_size
        ]
        if done:
            say(f"  {name}: {len(done)} of {len(ids)} were there")
        settings = self.cfg.suite
        loader = DataLoader(
            cast("Dataset[Sample]", samples), sampler=left, batch_size=settings.batch_size, num_workers=self.cfg.data.workers,
            collate_fn=Collate(self.segmenter.policy.encoder, self.segmenter.grammar),
        )  # fmt: skip
        told, count = time.monotonic(), 0
        with _new_part(self.folder, name, self.fabric.global_rank) as file:
            for batch in loader:
                start = time.monotonic()
                seeds = (
                    None
                    if settings.greedy
                    else [zlib.crc32(f"{self.cfg.seed}/{s.id}".encode()) for s in batch.samples]
                )
                with self.fabric.autocast():
                    answers = self.segmenter(batch.to(self.fabric.device), seeds)
                seconds = (time.monotonic() - start) / len(batch)
                for sample, answer in zip(batch.samples, answers, strict=True):
                    row = {"dataset": name, **_row(sample, answer, seconds), **self._parts(sample, answer)}
                    self._draw(name, sample, answer)  # before the line, which says that all is done
                    file.write(json.dumps(row) + "\n")
                file.flush()
                count += len(batch)
                if time.monotonic() - told > _SECONDS:
                    told = time.monotonic()
                    say(f"  {name} {count}/{len(left)}  {seconds:.2f} s an image")

    def _parts(self, sample: Sample, answer: Answer) -> dict[str, Any]:
        parts = self.family.parts(answer.mask.astype(np.uint8) * 255, sample.mask, sample.ignore)
        return {name: _packed(value) for name, value in parts.items()}

    def _draw(self, name: str, sample: Sample, answer: Answer) -> None:
        """The mask, and the overlay, where they are asked for."""
        settings, file = self.cfg.suite, f"{sample.id}.png"
        if settings.masks:
            path = self.folder / "masks" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(answer.mask.astype(np.uint8) * 255).save(path)
        if settings.overlays:
            cell = Cell(
                image=sample.image,
                truth=sample.mask,
                mask=answer.mask,
                prompt=answer.parsed.prompt,
                caption=answer.text,
            )
            sheet([[cell]], self.folder / "overlays" / name / file)

    def _conclude(self) -> dict[str, float]:
        """Join the lines, score, print and write. Raises ValueError naming samples that were not scored."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for name, samples in self.sets.items():
            found = {row["id"]: row for row in _lines(self.folder, name)}
            if missing := [one for one in samples.ids if one not in found]:
                raise ValueError(
                    f"{name}: {len(missing)} samples were not scored, {missing[0]} first (resume={self.folder})"
                )
            rows[name] = [found[one] for one in samples.ids]
        tables = {
            name: scores(self.family, [_unpacked(row) for row in found], self.cfg.suite.draws, self.cfg.seed)
            for name, found in rows.items()
        }
        faults = {
            name: float(np.mean([row["fault"] is not None for row in found])) for name, found in rows.items()
        }
        print_tables(tables, {name: len(found) for name, found in rows.items()}, faults)
        say(
            f"{self.family.convention}; {'greedy' if self.cfg.suite.greedy else f'sampled, seed {self.cfg.seed}'}"
        )
        report = {
            "suite": self.cfg.suite.name, "convention": self.family.convention, "greedy": self.cfg.suite.greedy,
            "seed": self.cfg.seed, "weights": Path(self.cfg.policy.weights).name, "seconds": round(time.monotonic() - self.began, 1),
            "datasets": {
                name: {
                    "n": len(rows[name]), "published": _published(self.cfg, name), "fault_rate": faults[name],
                    "scores": {key: asdict(score) for key, score in table.items()},
                }
                for name, table in tables.items()
            },
        }  # fmt: skip
        whole = self.folder / "per_sample.jsonl"
        partial = whole.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for found in rows.values() for row in found))
        partial.replace(whole)
        (self.folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
        for path in (self.folder / _PARTS).glob("*"):
            path.unlink()
        (self.folder / _PARTS).rmdir()
        return {
            f"test/{name}/{key}": value
            for name, table in tables.items()
            for key, value in [
                *((key, score.value) for key, score in table.items()),
                ("fault_rate", faults[name]),
            ]
        }


def _test_sets(cfg: DictConfig) -> dict[str, SampleSet]:
    """Those of the suite, or of the data where the suite names none; ValueError where one is not what its owners publish."""
    nodes = {name: one.samples for name, one in cfg.testsets.items()} or cfg.data.module.test
    if not nodes:
        raise ValueError(
            "suite: test sets are needed: +suite=NAME, +testset=NAME, or a data group that has some"
        )
    for name, one in cfg.testsets.items():
        if one.root is not None and not Path(one.root).exists():
            raise ValueError(
                f"testsets.{name}.root: there is no {one.root}; its owners publish it at {one.source}"
            )
    sets: dict[str, SampleSet] = {name: instantiate(node) for name, node in nodes.items()}
    for name, samples in sets.items():
        _check_ids(name, samples.ids, cfg.suite.masks or cfg.suite.overlays)
        published = _published(cfg, name)
        if published is not None and published != len(samples):
            raise ValueError(
                f"testsets.{name}: {published} samples are published, {len(samples)} are here: python -m segrl.prepare check "
                f"testset={name} says which are missing (testsets.{name}.published=null scores what is here)"
            )
    return sets


def _check_ids(name: str, ids: Sequence[str], files: bool) -> None:
    """Each is there once, and names a file inside the folder where it is to name one; ValueError where it does not."""
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise ValueError(f"{name}: an id of its own is needed for every sample; {one} is there twice")
        seen.add(one)
        place = PurePosixPath(f"{one}.png")
        if files and (place.is_absolute() or ".." in place.parts or "\0" in one):
            raise ValueError(
                f"suite.masks and overlays: ids that can name files are needed; {name} has {one!r}"
            )


def _published(cfg: DictConfig, name: str) -> int | None:
    """How many samples the owners of a test set publish; none where it is not known."""
    count: int | None = OmegaConf.select(cfg, f"testsets.{name}.published")
    return count


def _row(sample: Sample, answer: Answer, seconds: float) -> dict[str, Any]:
    """What is remembered of a sample beside its scores."""
    fault, prompt = answer.parsed.fault, answer.parsed.prompt
    said = {} if prompt is None else {
        "boxes": prompt.boxes.tolist(), "points": prompt.points.tolist(), "labels": prompt.labels.tolist()
    }  # fmt: skip
    return {
        "id": sample.id, "query": sample.query, "text": answer.text, "fault": None if fault is None else fault.name,
        **said, "seconds": round(seconds, 4),
    }  # fmt: skip


def _packed(value: np.ndarray) -> float | list[float]:
    """A number, or a curve; of a mask's curve, which has two levels, these two."""
    if len(value) == 1:
        return float(value[0])
    flat = bool((value[:-1] == value[0]).all())
    return [float(value[0]), float(value[-1])] if flat else [float(v) for v in value]


def _unpacked(row: dict[str, Any]) -> Parts:
    """The parts in a line, as `Family.parts` made them."""
    own = ("boxes", "points", "labels", "seconds")
    parts = {}
    for name, value in row.items():
        if name in own or not isinstance(value, float | list):
            continue
        listed = value if isinstance(value, list) else [value]
        parts[name] = np.array(listed if len(listed) != 2 else listed[:1] * 255 + listed[1:], np.float64)
    return parts


def _lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Of a dataset, whole lines only: a kill may have cut off the last one of a file."""
    finished = folder / "per_sample.jsonl"
    files = [finished] if finished.is_file() else sorted((folder / _PARTS).glob(f"*.{name}.jsonl"))
    for path in files:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                with suppress(json.JSONDecodeError):
                    row = json.loads(line)
                    if row["dataset"] == name:
                        yield row


def _new_part(folder: Path, name: str, rank: int) -> TextIO:
    """A file of this process's own."""
    home = folder / _PARTS
    home.mkdir(parents=True, exist_ok=True)
    attempt = len(list(home.glob(f"*-{rank}.{name}.jsonl")))
    return (home / f"{attempt:03}-{rank}.{name}.jsonl").open("x")


def print_tables(
    tables: dict[str, dict[str, Score]], counts: dict[str, int], faults: dict[str, float] | None = None
) -> None:
    """Datasets in rows, scores with their 95 % intervals in columns, few a line."""
    names = list(next(iter(tables.values())))
    wide = 11 if all(table[name].interval is None for table in tables.values() for name in names) else 28
    for start in range(0, len(names), 112 // wide):
        shown = names[start : start + 112 // wide]
        print(f"\n  {'':<16}{'n':>7}" + "".join(f"{name:>{wide}}" for name in shown))
        for dataset, table in tables.items():
            cells = "".join(f"{_cell(table[name]):>{wide}}" for name in shown)
            print(f"  {dataset:<16}{counts[dataset]:>7}{cells}")
    if faults is not None:
        print("\n  unparsable: " + ", ".join(f"{name} {rate:.1%}" for name, rate in faults.items()))


def _cell(score: Score) -> str:
    """Such as `0.7090 [0.6840, 0.7326]`."""
    digits = 2 if abs(score.value) >= 10 else 4
    if score.interval is None:
        return f"{score.value:.{digits}f}"
    low, high = score.interval
    return f"{score.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
