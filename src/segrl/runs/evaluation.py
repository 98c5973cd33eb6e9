"""Evaluate a policy on test sets, from a checked configuration to the table of scores.

Each batch is written as soon as it is segmented. A resumed evaluation segments only what is not yet written.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from segrl.data.collate import Collate, EvalShard
from segrl.data.datamodule import begin_worker
from segrl.host import signals
from segrl.host.files import write_whole
from segrl.metrics.parts import ScoreFamily, scores
from segrl.prompts import instructions
from segrl.protocols import Grammar, SampleSet
from segrl.runs import records
from segrl.runs.departures import of_counts, published
from segrl.runs.schema.sources import absent
from segrl.runs.tables import scores_text, tell
from segrl.runs.training import memory_said, quiet, run_folder, say
from segrl.segmenter import Segmenter
from segrl.tracking.checkpoints import learned_policy
from segrl.tracking.figures import Cell, sheet
from segrl.tracking.mlflow_runs import keep
from segrl.tracking.provenance import provenance
from segrl.tracking.run_folder import RunFolder, create, read_json
from segrl.types import Answer, Sample

_SECONDS = 5.0  # least time between two lines of progress


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """One evaluation with all its parts. `build` creates no folder, so an error there leaves none behind."""

    cfg: DictConfig
    folder: Path
    segmenter: Segmenter
    family: ScoreFamily
    sets: dict[str, SampleSet]
    fabric: Fabric
    logger: Any = None
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def build(cls, cfg: DictConfig) -> Evaluation:
        """Return the evaluation with its parts instantiated; no folder is created.

        Raises:
            ValueError: if a part cannot be made or does not fit, a file is damaged, `objective_metric` is no
                score, or weights or instructions have changed since a resumed evaluation began.
        """
        quiet()
        torch.manual_seed(cfg.seed)
        folder = run_folder(cfg)
        cfg.paths.run = str(folder)
        family: ScoreFamily = instantiate(cfg.scores)
        sets = _test_sets(cfg, family)
        grammar = instantiate(cfg.grammar)
        _check_objective(cfg, family, list(sets))
        if cfg.resume and RunFolder(folder).stamps.is_file():
            before, now = read_json(RunFolder(folder).stamps, "resume"), _stamps(cfg, grammar)
            if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
                raise ValueError(
                    f"resume: must have the weights and instructions that {folder} began with; "
                    f"{changed[0]} changed since then (start a new evaluation)"
                )
        policy = instantiate(cfg.policy)
        if cfg.init_from is not None:
            learned = learned_policy(Path(cfg.init_from), "init_from")
            try:
                policy.load_policy(learned)
            except ValueError as error:
                raise ValueError(
                    f"init_from: must be a policy of this architecture; {cfg.init_from} has another ({error})"
                ) from None
        segmenter = Segmenter(
            policy=policy.eval(), grammar=grammar,
            engine=instantiate(cfg.rollout), head=instantiate(cfg.head),
        )  # fmt: skip
        trainer = cfg.trainer
        try:
            fabric = Fabric(
                accelerator=trainer.accelerator, devices=trainer.devices,
                num_nodes=trainer.get("num_nodes", 1), precision=trainer.precision,
                strategy="auto" if trainer.devices == 1 else "ddp",
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:  # an unavailable device or precision
            raise ValueError(f"trainer: {error}") from None
        return cls(cfg=cfg, folder=folder, segmenter=segmenter, family=family, sets=sets, fabric=fabric)

    def run(self) -> float | None:
        """Segment all samples that have no line yet, score all samples, and write and print the results.

        Returns:
            The score `objective_metric`; None if it is unset, and on all ranks but the first.

        Raises:
            ValueError: if the score `objective_metric` is NaN for these samples.
        """
        self.fabric.launch()
        for module in (self.segmenter.policy, self.segmenter.head):
            cast("torch.nn.Module", module).to(self.fabric.device)
        if self.fabric.is_global_zero:
            self._open()
        # Ranks that a launcher started have each composed a name of their own: take the first rank's.
        self.folder = Path(self.fabric.broadcast(str(self.folder)))
        self.fabric.barrier()
        for name, samples in self.sets.items():
            self._segment(name, samples)
        self.fabric.barrier()
        if not self.fabric.is_global_zero:
            return None
        metrics = self._conclude()
        keep(self.logger, RunFolder(self.folder).artifacts, metrics)
        if self.logger is not None:
            self.logger.finalize("success")
        say(f"results in {self.folder}")
        wanted = self.cfg.objective_metric
        if wanted is not None and wanted not in metrics:
            raise ValueError(
                f"objective_metric: must be a number for these samples; {wanted} is NaN (choose another)"
            )
        return None if wanted is None else metrics[wanted]

    def _open(self) -> None:
        """Create the folder and its logger, on the first rank."""
        cfg = self.cfg
        with signals.held():
            logger, text, made = self._logger()  # raises before anything is created
            if cfg.resume is None:
                self.folder = create(self.folder, alone=True)
                if str(self.folder) != cfg.paths.run:  # another process has created that folder meanwhile
                    cfg.paths.run = str(self.folder)
                    logger, text, made = self._logger()
            folder = RunFolder(self.folder)
            write_whole(folder.config, text)
            stamps = _stamps(cfg, self.segmenter.grammar)
            write_whole(folder.stamps, json.dumps(stamps, indent=2) + "\n")
            if not folder.provenance.is_file():  # a resumed one keeps its first command's
                write_whole(folder.provenance, json.dumps(made, indent=2) + "\n")
            self.logger = logger
        signals.check()
        say(f"{cfg.suite.name}: {sum(map(len, self.sets.values()))} samples; results in {self.folder}")
        if not cfg.testsets:  # `_test_sets` has checked those of a suite
            for line in of_counts(cfg, self.sets):
                say(f"  {line}")

    def _logger(self) -> tuple[Logger, str, dict[str, str]]:
        """Return the logger of the folder `paths.run`, the configuration as YAML, and the provenance."""
        text = OmegaConf.to_yaml(self.cfg)
        made = provenance(text)
        logger: Logger = instantiate(self.cfg.logger)(Path(self.cfg.paths.run), made)
        return logger, text, made

    def stopped(self, stop: signals.Stopped) -> None:
        """Print how many samples have a line on the disk, and the command that resumes; close the logger."""
        stop.told = True
        if not RunFolder(self.folder).config.is_file():
            say(f"stopped by {stop.name} before anything was written")
            return
        kept = sum(len({row["id"] for row in records.lines(self.folder, name)}) for name in self.sets)
        say(
            f"stopped; {kept} of {sum(map(len, self.sets.values()))} samples are answered and saved; "
            f"continue with: python -m segrl.evaluate resume={self.folder}"
        )
        if self.logger is not None:
            self.logger.finalize("KILLED")

    @torch.inference_mode()
    def _segment(self, name: str, samples: SampleSet) -> None:
        """Segment this rank's share of the samples that have no line yet, and write one line per sample."""
        done, ids = {row["id"] for row in records.lines(self.folder, name)}, samples.ids
        self.fabric.barrier()  # no rank writes before all have read the lines
        left = [i for i, one in enumerate(ids) if one not in done]
        shard = EvalShard(len(left), self.fabric.global_rank, self.fabric.world_size)
        if done:
            say(f"  {name}: {len(done)} of {len(ids)} were answered before")
        settings = self.cfg.suite
        loader = DataLoader(
            Subset(cast("Dataset[Sample]", samples), left), sampler=shard, batch_size=settings.batch_size,
            num_workers=self.cfg.data.workers,
            collate_fn=Collate(self.segmenter.policy.encoder, self.segmenter.grammar),
            worker_init_fn=begin_worker,
        )  # fmt: skip
        told, count = time.monotonic(), 0
        with records.new_part(self.folder, name, self.fabric.global_rank) as file:
            for batch in loader:
                start = time.monotonic()
                seeds = (
                    None
                    if settings.greedy
                    else [zlib.crc32(f"{self.cfg.seed}/{s.id}".encode()) for s in batch.samples]
                )
                with memory_said("suite.batch_size"), self.fabric.autocast():
                    answers = self.segmenter(batch.to(self.fabric.device), seeds)
                seconds = (time.monotonic() - start) / len(batch)
                for sample, answer in zip(batch.samples, answers, strict=True):
                    self._draw(name, sample, answer)  # first, because the line marks the sample as done
                    file.write(json.dumps(self._line(name, sample, answer, seconds), allow_nan=False) + "\n")
                file.flush()
                signals.check()  # in case a library has caught `Stopped`
                count += len(batch)
                if time.monotonic() - told > _SECONDS:
                    told = time.monotonic()
                    say(f"  {name} {count}/{len(shard)}  {seconds:.2f} s per image")

    def _line(self, name: str, sample: Sample, answer: Answer, seconds: float) -> dict[str, Any]:
        faulty = answer.parsed.fault is not None
        parts = self.family.parts(answer.mask.astype(np.uint8) * 255, sample.mask, sample.ignore, faulty)
        return records.row(name, sample, answer, parts, self.family, seconds)

    def _draw(self, name: str, sample: Sample, answer: Answer) -> None:
        """Write the mask and the overlay of a sample, if `suite.masks` and `suite.overlays` are set."""
        settings, file = self.cfg.suite, f"{sample.id}.png"
        if settings.masks:
            path = RunFolder(self.folder).masks / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(answer.mask.astype(np.uint8) * 255).save(path)
        if settings.overlays:
            cell = Cell(
                image=sample.image, truth=sample.mask, mask=answer.mask,
                prompt=answer.parsed.prompt, caption=answer.text,
            )  # fmt: skip
            sheet([[cell]], RunFolder(self.folder).overlays / name / file)

    def _conclude(self) -> dict[str, float]:
        """Score all lines, print the table, write the results, and return scores by logged name, without NaN.

        Raise ValueError naming the first sample that has no line.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        for name, samples in self.sets.items():
            found = {row["id"]: row for row in records.lines(self.folder, name)}
            if missing := [one for one in samples.ids if one not in found]:
                raise ValueError(
                    f"{name}: every sample must have a line; {len(missing)} have none, first {missing[0]} "
                    f"(resume={self.folder} segments them)"
                )
            rows[name] = [found[one] for one in samples.ids]
        joined = {
            name: [line for one in members for line in rows[one]]
            for name, members in self.cfg.suite.unions.items()
        }
        clusters = {name: records.clusters(found) for name, found in {**rows, **joined}.items()}
        tables = {
            name: scores(
                self.family,
                [records.parts_of(line) for line in found],
                self.cfg.suite.draws,
                self.cfg.seed,
                clusters[name],
            )
            for name, found in {**rows, **joined}.items()
        }
        images = {name: int(numbers.max()) + 1 for name, numbers in clusters.items()}
        counts = {name: len(found) for name, found in {**rows, **joined}.items()}
        faults = {
            name: float(np.mean([line["fault"] is not None for line in found]))
            for name, found in {**rows, **joined}.items()
        }
        tell(
            f"{scores_text(tables, counts, faults, images)}\n"
            + "\n".join(f"{key}: {value}" for key, value in self._identity().items()),
            RunFolder(self.folder).table,
        )
        report = {
            **self._identity(), "seconds": round(time.monotonic() - self.began, 1),
            "datasets": {
                name: {
                    "n": counts[name], "images": images[name], "published": published(self.cfg, name),
                    "fault_rate": faults[name],
                    "scores": {key: score.as_json() for key, score in table.items()},
                }
                for name, table in tables.items()
            },
        }  # fmt: skip
        records.join(self.folder, rows)
        write_whole(RunFolder(self.folder).metrics, json.dumps(report, indent=2, allow_nan=False) + "\n")
        values = {
            f"test/{name}/{key}": score.value
            for name, table in tables.items()
            for key, score in table.items()
        }
        values |= {f"test/{name}/fault_rate": rate for name, rate in faults.items()}
        return {name: value for name, value in values.items() if not np.isnan(value)}

    def _identity(self) -> dict[str, Any]:
        """Return the settings that distinguish one table from another: what was scored, and how."""
        cfg = self.cfg
        return {
            "suite": cfg.suite.name, "weights": Path(cfg.policy.weights).name,
            "checkpoint": None if cfg.init_from is None else str(cfg.init_from),
            "grammar": str(cfg.grammar._target_).rpartition(".")[2],
            "instructions": instructions.digest(self.segmenter.grammar),
            "head": Path(str(cfg.head.checkpoint)).name, "image_side": cfg.policy.image_side,
            "precision": str(cfg.trainer.precision), "head_precision": cfg.head.get("precision", "float32"),
            "answers": "greedy" if cfg.suite.greedy else f"sampled, seed {cfg.seed}",
            "convention": self.family.convention,
        }  # fmt: skip


def _stamps(cfg: DictConfig, grammar: Grammar) -> dict[str, list[str | int]]:
    """Return the state of weights and instructions, which a resumed evaluation must find unchanged.

    Under the path of each file of weights: size in bytes, time of modification in ns. Under "instructions":
    their digest.
    """
    weights = Path(cfg.policy.weights)
    files = [
        *sorted(weights.glob("*.safetensors")),
        *(Path(str(p)) for p in (cfg.init_from, cfg.head.checkpoint) if p),
    ]
    stamps: dict[str, list[str | int]] = {"instructions": [instructions.digest(grammar)]}
    for path in files:
        if path.is_file():
            stamps[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
    return stamps


def _test_sets(cfg: DictConfig, family: ScoreFamily) -> dict[str, SampleSet]:
    """Return the test sets in `testsets` or, if there are none, those of `data`, by name.

    Raises:
        ValueError: if there are no test sets, a root does not exist, or `family` cannot score a set's ignored
            regions. Also if ids are unfit (`_check_ids`), or a set of `testsets` has not the published size.
    """
    nodes = {name: one.samples for name, one in cfg.testsets.items()} or cfg.data.module.test
    if not nodes:
        raise ValueError(
            "suite: must give test sets; there are none "
            "(+suite=NAME, +testset=NAME, or a data group that has test sets)"
        )
    for name, one in cfg.testsets.items():
        if one.root is not None and not Path(one.root).exists():
            raise ValueError(absent(f"testsets.{name}.root", one.root, one.source))
        if one.get("ignored", False) and not family.knows_ignored:
            raise ValueError(f"scores: must support ignored regions, which {name} has (scores=referring)")
    sets: dict[str, SampleSet] = {name: instantiate(node) for name, node in nodes.items()}
    for name, samples in sets.items():
        _check_ids(name, samples.ids, next((key for key in ("masks", "overlays") if cfg.suite[key]), None))
        owners = published(cfg, name)
        if cfg.testsets and owners is not None and owners != len(samples):
            raise ValueError(
                f"testsets.{name}: must have {owners} samples, as published; {len(samples)} were found "
                f"(python -m segrl.prepare check examines a download; "
                f"testsets.{name}.published=null scores what was found)"
            )
    return sets


def _check_objective(cfg: DictConfig, family: ScoreFamily, sets: Sequence[str]) -> None:
    """Raise ValueError if `objective_metric` is set and names no score of this evaluation."""
    wanted = cfg.objective_metric
    names = [
        f"test/{one}/{name}" for one in (*sets, *cfg.suite.unions) for name in (*family.names, "fault_rate")
    ]
    if wanted is not None and wanted not in names:
        raise ValueError(f"objective_metric: must be null or one of {', '.join(names)}; got {wanted}")


def _check_ids(name: str, ids: Sequence[str], files: str | None) -> None:
    """Raise ValueError if an id is not unique, or cannot name a file although `files` is not None.

    Args:
        name: name of the test set.
        ids: ids of its samples.
        files: "masks" or "overlays", the key of `suite` that asks for files named by ids.
    """
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise ValueError(f"{name}: every sample must have an id of its own; {one} occurs twice")
        seen.add(one)
        place = PurePosixPath(f"{one}.png")
        if files and (place.is_absolute() or ".." in place.parts or "\0" in one):
            raise ValueError(f"suite.{files}: must be false if an id cannot name a file; {name} has {one!r}")
