"""Run a training, from a checked configuration to its report."""

from __future__ import annotations

import atexit
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning
import torch
import torch.distributed.nn
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from segrl.data.datamodule import SegDataModule
from segrl.data.survey import ItemDataset
from segrl.host import signals
from segrl.host.files import own, write_whole
from segrl.runs import checks, report
from segrl.runs.assembly import stage_of
from segrl.runs.configuration import asset
from segrl.runs.departures import of_batch, of_counts
from segrl.runs.report import means
from segrl.runs.scoring import Scoring
from segrl.runs.tables import Table, means_text, tell
from segrl.stages.base import SegStage, Stage
from segrl.stages.policy_gradient import PolicyGradientStage
from segrl.tracking.callbacks import cut_history, read_history
from segrl.tracking.checkpoints import AtomicCheckpointIO, Stop, read_checkpoint, saved_step
from segrl.tracking.figures import curves
from segrl.tracking.mlflow_runs import keep, where
from segrl.tracking.provenance import provenance
from segrl.tracking.run_folder import RunFolder, create, free_name

# Environment variable in which ranks that Lightning starts find the first rank's folder.
_FOLDER = "SEGRL_RUN_FOLDER"
_CURVES = ("reward/total", "reward/iou", "reward/structure", "rollout/fault_rate", "sft/loss", "head/iou")


def quiet() -> None:
    """Silence progress bars, log messages and warnings of the libraries."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # `whole_model` checks the weights itself
    warnings.filterwarnings("ignore", module="lightning|torch|mlflow|transformers")


@atexit.register
def _leave_group() -> None:
    """Destroy the process group at exit, while Python still runs.

    A gloo thread that releases a tensor later aborts the process; Lightning only destroys NCCL groups. Gloo's
    threads end with the last reference to the group. DDP's wrapper holds one, hence the garbage collection.
    `torch.distributed.nn` keeps one if it is imported while a group exists, so this module imports it before.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


@contextmanager
def memory_said(key: str) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU inside the context into a ValueError.

    Args:
        key: key to lower, which the error names first.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{key}: must be small enough for the GPU's memory, which ran out "
            f"({str(error).splitlines()[0][:160]}); "
            "lower it, or see docs/speed.md, Memory, for other keys that save memory"
        ) from error


def say(line: str) -> None:
    """Print a line to stdout, on the first rank only."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(line, flush=True)


def run_folder(cfg: DictConfig) -> Path:
    """Return the folder of a new run, which is not created, or of a resumed run, which the first rank locks.

    Raises:
        ValueError: if a resumed folder is used by another process, or holds a folder in place of a file or a
            file in place of a folder. Also if a new run of several ranks finds its folder taken.
    """
    if cfg.resume is not None:
        folder = Path(cfg.resume)
        RunFolder(folder).check_kinds("resume")
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            own(folder, "resume")
        return folder
    folder = Path(cfg.paths.run)
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return Path(os.environ.get(_FOLDER, folder))
    if folder.exists() and signals.ranks() > 1:
        return create(folder, alone=False)  # raises, because the folder exists
    return free_name(folder)


@dataclass(slots=True, kw_only=True)
class Run:
    """One run with all its parts. `build` creates no folder, so an error there leaves none behind."""

    cfg: DictConfig
    folder: Path
    stage: Stage
    data: SegDataModule
    trainer: lightning.Trainer
    logger: Logger | None
    before: str | None  # text of config.yaml in a resumed run's folder
    scored_before: bool  # whether it has readable scores from before the training
    begun_at: int  # update of the loaded checkpoint
    trained: bool = False
    scored: bool = False
    scored_step: int | None = None  # update of best.ckpt, if that is scored
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def build(cls, cfg: DictConfig) -> Run:
        """Instantiate data, stage and trainer, and load the checkpoints that the run starts from.

        Raises:
            ValueError: if they do not fit each other, or a file is damaged.
        """
        quiet()
        torch.manual_seed(cfg.seed)
        folder = run_folder(cfg)
        cfg.paths.run = str(folder)
        checks.words(cfg)
        checks.checkpoints(cfg)
        data: SegDataModule = instantiate(cfg.data.module)
        stage: Stage = stage_of(cfg.stage)
        data.connect(stage.collate, stage.eval_collate, stage.updates_per_batch)
        checks.metrics(cfg, data)
        checks.ids(data)
        scored = report.readable(RunFolder(folder).before)
        if scored is not None:
            report.check_same_samples(scored, {name: s.ids for name, s in data.test.items()})
        if cfg.init_from is not None:
            cls._start_from(stage, Path(cfg.init_from))
        loaded = None
        if cfg.ckpt_path is not None:
            loaded = read_checkpoint(Path(cfg.ckpt_path), "resume" if cfg.resume else "ckpt_path")
            stage.on_load_checkpoint(loaded)
        stage.started_from = cfg.init_from
        saved = RunFolder(folder).config
        return cls(
            cfg=cfg, folder=folder, stage=stage, data=data, trainer=cls._trainer(cfg), logger=None,
            before=saved.read_text() if saved.is_file() else None, scored_before=scored is not None,
            begun_at=0 if loaded is None else loaded["global_step"],
        )  # fmt: skip

    @staticmethod
    def _trainer(cfg: DictConfig) -> lightning.Trainer:
        """Return the trainer of the run; its callbacks write into the run folder."""
        trainer: lightning.Trainer = instantiate(
            cfg.trainer, logger=False,
            callbacks=[*(instantiate(c) for c in cfg.callbacks.values()), Scoring(), Stop()],
            plugins=[AtomicCheckpointIO()], default_root_dir=str(cfg.paths.run),
        )  # fmt: skip
        return trainer

    def open(self) -> None:
        """Create the run folder and its logger, on the first rank."""
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        cfg = self.cfg
        with signals.held():
            logger, text, made = self._logger()  # raises before anything is created
            if cfg.resume is None:
                self.folder = create(Path(cfg.paths.run), signals.ranks() == 1)
                os.environ[_FOLDER] = str(self.folder)
                if str(self.folder) != cfg.paths.run:  # another process has created that folder meanwhile
                    cfg.paths.run = str(self.folder)
                    self.trainer = self._trainer(cfg)
                    logger, text, made = self._logger()
            folder = RunFolder(self.folder)
            write_whole(folder.config, text)
            if not folder.provenance.is_file():
                write_whole(folder.provenance, json.dumps(made, indent=2) + "\n")
            # MLflow keeps the first values; changes of a resumed run are only in config.yaml
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
            self.logger = self.trainer.logger = logger
        signals.check()

    def _logger(self) -> tuple[Logger, str, dict[str, str]]:
        """Return the logger of the folder `paths.run`, the configuration as YAML, and the provenance."""
        # Unresolved, so that an override of a resumed run also changes the keys that refer to it.
        text = OmegaConf.to_yaml(self.cfg)
        made = provenance(text)
        logger: Logger = instantiate(self.cfg.logger)(Path(self.cfg.paths.run), made)
        return logger, text, made

    @staticmethod
    def _start_from(stage: Stage, checkpoint: Path) -> None:
        """Load the policy of an earlier stage. Raise ValueError if stage or architecture does not fit."""
        if not isinstance(stage, SegStage):
            raise ValueError(
                f"init_from: must be null in a stage that does not train a policy to segment; "
                f"got {checkpoint}"
            )
        weights = read_checkpoint(checkpoint, "init_from")["state_dict"]
        try:
            stage.start_from(
                {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
            )
        except ValueError as error:
            raise ValueError(
                f"init_from: must be a policy of this architecture; {checkpoint} has another ({error})"
            ) from None

    @property
    def step(self) -> int:
        """Number of updates done."""
        return self.trainer.global_step

    def announce(self) -> None:
        """Print what is trained and where, and remarks on batch, test sets, history and reference."""
        learned = sum(p.numel() for p in self.stage.parameters() if p.requires_grad)
        say(f"{self.cfg.name}: {learned / 1e6:.1f} M trainable parameters; results in {self.folder}")
        for line in (*of_batch(self.cfg, self.trainer.world_size), *of_counts(self.cfg, self.data.test)):
            say(f"  {line}")
        if self.cfg.resume and (cut := cut_history(RunFolder(self.folder).history, self.begun_at)):
            say(f"  {cut}")
        if (
            isinstance(self.stage, PolicyGradientStage)
            and self.cfg.reference
            and self.stage.reference is None
        ):
            say("  reference: not used, because stage.kl_weight and stage.kl_reward are 0")

    @property
    def _seg_stage(self) -> SegStage | None:
        """The stage if it is a SegStage and there are test sets, else None."""
        return self.stage if isinstance(self.stage, SegStage) and self.data.test else None

    @property
    def _unseen(self) -> list[str]:
        """Names of the test sets read from files if the policy is `policy_nano`, trained on drawn scenes.

        Empty for any other policy.
        """
        if str(self.cfg.policy.weights) != asset("policy_nano"):
            return []
        return [name for name, samples in self.data.test.items() if isinstance(samples, ItemDataset)]

    def _test(self, stage: SegStage, lines: Path) -> report.Scores:
        """Score the test sets, save a line per sample, and return the scores of all samples on every rank."""
        say(f"scoring the test sets ({lines.stem}) ...")
        with memory_said("data.module.eval_batch_size"):
            self.trainer.test(stage, self.data, verbose=False)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        (scoring,) = (one for one in callbacks if isinstance(one, Scoring))
        rows = scoring.everywhere(self.data.test)
        if self.trainer.is_global_zero:
            report.save(rows, lines)
        return report.scores(row.line for found in rows.values() for row in found)

    def test_before(self) -> None:
        """Score before the training, unless `test_before` is false or a resumed run has the scores."""
        if self._seg_stage is not None and self.cfg.test_before and not self.scored_before:
            self._test(self._seg_stage, RunFolder(self.folder).before)

    def fit(self) -> None:
        """Train.

        Raises:
            ValueError: if the checkpoint does not fit, or the training fails; a resumed run that has made no
                update gets its old config.yaml back.
            Stopped: after a signal.
        """
        try:
            with memory_said("stage.micro_batch_size"), signals.held():
                self.trainer.fit(self.stage, self.data, ckpt_path=self.cfg.ckpt_path, weights_only=True)
        except ValueError:
            if self.before is not None and not self.stage.latest:  # no update: leave the run as it was
                if self.trainer.is_global_zero:
                    write_whole(RunFolder(self.folder).config, self.before)
            elif RunFolder(self.folder).last.is_file():
                say(f"fix the cause, then continue with: python -m segrl.train resume={self.folder}")
            raise
        self.trained = True
        # Ranks that a launcher started have each composed a name of their own: take the first rank's.
        self.folder = Path(self.trainer.strategy.broadcast(str(self.folder)))
        signals.check()

    def stopped(self, stop: signals.Stopped) -> None:
        """Print what is saved, as read from the disk, and the command that resumes; close the logger."""
        say(self._kept(stop))
        stop.told = True
        if self.logger is not None:
            self.logger.finalize("KILLED")

    def _kept(self, stop: signals.Stopped) -> str:
        last, go_on = RunFolder(self.folder).last, f"python -m segrl.train resume={self.folder}"
        if not RunFolder(self.folder).config.is_file():
            return f"stopped by {stop.name} before anything was written"
        if not last.is_file() and self.step == 0:
            return f"stopped before the first update, so there is nothing to save; start again with: {go_on}"
        try:
            step = saved_step(last)
        except ValueError as error:
            return f"stopped at step {self.step}, and not saved: {error}; start again with: {go_on}"
        if step < self.step:
            return f"stopped at step {self.step}; the last saved step is {step}; continue with: {go_on}"
        if self.scored:
            return (
                f"trained, saved at step {step} and scored; "
                f"stopped while results were copied; copy them again with: {go_on}"
            )
        if self.trained:
            return f"trained and saved at step {step}, not scored; continue with: {go_on}"
        return f"stopped and saved at step {step}; continue with: {go_on}"

    def _take_best(self, stage: SegStage) -> None:
        """Load the weights of best.ckpt, the best in validation, if it exists."""
        chosen = RunFolder(self.folder).scored
        if chosen == RunFolder(self.folder).best:
            saved = read_checkpoint(chosen, "callbacks.best")
            stage.load_state_dict(saved["state_dict"], strict=False)
            self.scored_step = int(saved["global_step"])
            say(f"scoring {chosen}, saved at update {self.scored_step}")

    def finish(self) -> float | None:
        """Score after the training, compare with before, draw, and save the results.

        Returns:
            The score `objective_metric`; None if it is unset or unknown, and on all ranks but the first.
        """
        folder, stage = RunFolder(self.folder), self._seg_stage
        metrics: dict[str, float] = {}
        table: Table = {}
        if stage is not None:
            self._take_best(stage)
            metrics = means(self._test(stage, folder.after))
        if not self.trainer.is_global_zero:
            return None
        curves(read_history(folder.history), _CURVES, folder.curve)
        if stage is not None:
            if report.readable(folder.before) is not None:
                table = report.conclude(
                    folder.path, self.cfg.seed, self.step, self.cfg.stage.optimizer.lr, self._unseen
                )
            else:
                tell(means_text(metrics), folder.table)
            report.draw(next(iter(self.data.test.values())), folder.before, folder.after, folder.picture)
        metrics |= {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        return self._keep(metrics, table)

    def _keep(self, metrics: dict[str, float], table: Table) -> float | None:
        """Write metrics.json, log the results, print where they are; return the score `objective_metric`."""
        folder = RunFolder(self.folder)
        objective = metrics.get(self.cfg.objective_metric or "")
        if not self.trainer.is_global_zero or self.logger is None:
            return objective
        summary = {
            "name": self.cfg.name, "seed": self.cfg.seed, "steps": self.step,
            "scored_step": self.step if self.scored_step is None else self.scored_step,
            "completions": self.stage.sampled, "objective": objective, "metrics": metrics,
            "test": {d: {m: asdict(c) for m, c in rows.items()} for d, rows in table.items()},
            "seconds": round(time.monotonic() - self.began, 1),
        }  # fmt: skip
        write_whole(folder.metrics, json.dumps(summary, indent=2) + "\n")
        self.scored = True
        final = metrics if objective is None else {**metrics, "objective": objective}
        keep(self.logger, folder.artifacts, final)
        self.logger.finalize("success")
        say(f"\nresults in {folder.path}")
        if line := where(self.logger, self.cfg.paths.runs):
            say(line)
        return objective
