"""One training run, from a checked configuration to its report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from segrl.data.datamodule import SegDataModule
from segrl.metrics.saliency import NAMES
from segrl.stages.base import SegStage, Stage
from segrl.tracking import report
from segrl.tracking.callbacks import read_history
from segrl.tracking.checkpoints import AtomicCheckpointIO, read_checkpoint
from segrl.tracking.figures import curves
from segrl.tracking.mlflow_runs import keep
from segrl.tracking.provenance import provenance

_CURVES = ("reward/total", "reward/iou", "reward/structure", "rollout/fault_rate", "sft/loss", "head/iou")


def _quiet() -> None:
    """Progress is ours to print."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning|torch|mlflow")


def _fresh(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 ... that does not exist."""
    numbered = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))
    return folder if not folder.exists() else next(path for path in numbered if not path.exists())


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything of one run, built; nothing is on the disk before all of it could be built."""

    cfg: DictConfig
    folder: Path
    stage: Stage
    data: SegDataModule
    trainer: lightning.Trainer
    logger: Logger
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def build(cls, cfg: DictConfig) -> Run:
        """Instantiate data, stage, trainer; then create the run folder. Raises ValueError on what does not fit."""
        _quiet()
        torch.manual_seed(cfg.seed)
        folder = Path(cfg.resume) if cfg.resume else _fresh(Path(cfg.paths.run))
        cfg.paths.run = str(folder)
        data: SegDataModule = instantiate(cfg.data.module)
        stage: Stage = instantiate(cfg.stage)
        data.connect(stage.collate, stage.eval_collate)
        cls._check_objective(cfg.objective_metric, data)
        if (scored := folder / "evaluation" / "before.jsonl").is_file():
            report.check_same_samples(report.load(scored), {name: s.ids for name, s in data.test.items()})
        if cfg.init_from is not None:
            cls._start_from(stage, Path(cfg.init_from))
        if cfg.ckpt_path is not None:
            stage.on_load_checkpoint(read_checkpoint(Path(cfg.ckpt_path)))
        # unresolved: an override of a resumed run reaches all that refers to it
        text = OmegaConf.to_yaml(cfg)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text)
        logger: Logger = instantiate(cfg.logger)(folder, provenance(text))
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        trainer: lightning.Trainer = instantiate(
            cfg.trainer, logger=logger, callbacks=[instantiate(c) for c in cfg.callbacks.values()],
            plugins=[AtomicCheckpointIO()], default_root_dir=str(folder),
        )  # fmt: skip
        return cls(cfg=cfg, folder=folder, stage=stage, data=data, trainer=trainer, logger=logger)

    @staticmethod
    def _check_objective(wanted: str | None, data: SegDataModule) -> None:
        """A name that is mistyped must not come out after the training."""
        named = {"test": data.test, "val": data.val}
        known = [
            f"{split}/{dataset}/{metric}"
            for split, sets in named.items()
            for dataset in sets
            for metric in NAMES
        ]
        if wanted is not None and wanted not in known:
            raise ValueError(f"objective_metric: one of {', '.join(known)} is needed; got {wanted}")

    @staticmethod
    def _start_from(stage: Stage, checkpoint: Path) -> None:
        """Take over the policy of an earlier stage."""
        if not isinstance(stage, SegStage):
            raise ValueError(
                "init_from: a stage that trains a policy to segment is needed; this one does not"
            )
        weights = read_checkpoint(checkpoint)["state_dict"]
        try:
            stage.start_from(
                {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
            )
        except ValueError as error:
            raise ValueError(
                f"init_from: a policy of this architecture is needed; {checkpoint} has another ({error})"
            ) from None

    @property
    def step(self) -> int:
        """Updates done."""
        return self.trainer.global_step

    def announce(self) -> None:
        """Say what runs where."""
        learned = sum(p.numel() for p in self.stage.parameters() if p.requires_grad)
        print(
            f"{self.cfg.name}: {learned / 1e6:.1f} M parameters learn; results in {self.folder}", flush=True
        )

    @property
    def _seg_stage(self) -> SegStage | None:
        """The stage, if it can be scored on test sets."""
        return self.stage if isinstance(self.stage, SegStage) and self.data.test else None

    def _test(self, stage: SegStage, name: str) -> report.Scores:
        """Score the test sets, one line per sample into the run folder."""
        print(f"scoring the test sets ({name}) ...", flush=True)
        self.trainer.test(stage, self.data, verbose=False)
        return report.save(stage.records, self.folder / "evaluation" / f"{name}.jsonl")

    def test_before(self) -> None:
        """Score the start, unless a run that is gone on with already has."""
        done = (self.folder / "evaluation" / "before.jsonl").is_file()
        if self._seg_stage is not None and self.cfg.test_before and not done:
            self._test(self._seg_stage, "before")

    def fit(self) -> bool:
        """Train; false if the process was asked to stop, after saving."""
        try:
            self.trainer.fit(self.stage, self.data, ckpt_path=self.cfg.ckpt_path, weights_only=True)
        except SIGTERMException:
            return False
        return True

    def score(self) -> float | None:
        """Score without training: the means on stdout, one line per sample and metrics.json in the run folder."""
        if self._seg_stage is None:
            raise ValueError("data: test sets are needed to score a policy; this dataset has none")
        metrics = report.means(self._test(self._seg_stage, "after"))
        for name, value in metrics.items():
            print(f"  {name:<32}{value:.4f}")
        return self._keep(metrics, {}, [])

    def finish(self) -> float | None:
        """Score, compare, draw, keep; print the table and where everything is."""
        folder, stage = self.folder, self._seg_stage
        metrics: dict[str, float] = {}
        table: report.Table = {}
        drawn = curves(read_history(folder / "history.jsonl"), _CURVES, folder / "reward_curve.png")
        if stage is not None:
            before, after = (folder / "evaluation" / f"{name}.jsonl" for name in ("before", "after"))
            scores = self._test(stage, "after")
            metrics = report.means(scores)
            if before.is_file():
                table = report.compare(report.load(before), scores, self.cfg.seed)
                report.print_table(table)
            report.draw(stage.records, before, after, folder / "before_after.png")
        metrics |= {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        return self._keep(metrics, table, [drawn] if drawn else [])

    def _keep(self, metrics: dict[str, float], table: report.Table, drawn: list[Path]) -> float | None:
        """Write metrics.json, copy everything to the tracker, say where it is."""
        folder = self.folder
        objective = metrics.get(self.cfg.objective_metric or "")
        summary = {
            "name": self.cfg.name, "seed": self.cfg.seed, "steps": self.step, "objective": objective,
            "metrics": metrics, "test": {d: {m: asdict(c) for m, c in rows.items()} for d, rows in table.items()},
            "seconds": round(time.monotonic() - self.began, 1),
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
        kept = ("metrics.json", "config.yaml", "before_after.png", "sheets", "evaluation", "checkpoints")
        final = metrics if objective is None else {**metrics, "objective": objective}
        keep(self.logger, [*(folder / name for name in kept), *drawn], final)
        self.logger.finalize("success")
        runs = self.cfg.paths.runs
        where = "" if runs == "runs" else f" RUNS={runs}"
        print(
            f"\nresults in {folder}\nopen MLflow: make mlflow{where} (then http://127.0.0.1:5000)", flush=True
        )
        return objective
