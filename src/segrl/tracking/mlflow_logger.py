"""Lightning logger for MLflow. If MLflow fails, the run continues and its folder keeps all scalars."""

from __future__ import annotations

import atexit
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from segrl.tracking.mlflow_store import Place, Rows, Run, failures, reason
from segrl.tracking.run_folder import RunFolder


class MlflowRun(Logger):
    """Logger that tracks a run folder in MLflow.

    The MLflow run is created at the first use, when the folder exists. The first failure is printed and turns
    MLflow off until `conclude`, which tries again to add what is missing; `segrl.track` can do that later.
    The MLflow run is RUNNING until `conclude`, then FINISHED. It is FAILED after an error, and KILLED if the
    process was stopped.

    Args:
        place: database and experiment.
        folder: folder of the run.
        tags: tags of a new MLflow run.
        name: name of a new MLflow run.
        checkpoints: whether checkpoints are copied into the artifacts.
    """

    def __init__(
        self, place: Place, folder: Path, tags: Mapping[str, str], name: str, checkpoints: bool
    ) -> None:
        super().__init__()
        self.place, self.folder, self.tags, self.run_name = place, folder, dict(tags), name
        self.checkpoints = checkpoints
        self.off = False
        self.run: Run | None = None
        self._config: dict[str, Any] = {}
        self._trainer: lightning.Trainer | None = None
        self._last = (0, 0.0)  # last logged update, and its time in seconds

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.place.experiment

    @property
    def version(self) -> str:
        """Id of the MLflow run; an empty string if there is none yet."""
        return "" if self.run is None else self.run.run_id

    def log_graph(self, model: lightning.LightningModule, *_: object) -> None:  # type: ignore[override]
        """Keep the trainer, which counts updates; Lightning calls this before it logs anything."""
        self._trainer = model.trainer

    def log_hyperparams(  # type: ignore[override]
        self, params: dict[str, Any] | Namespace, *_: object
    ) -> None:
        """Log the configuration."""
        self._config = dict(vars(params) if isinstance(params, Namespace) else params)
        self._attempt(lambda run: run.describe(self._config))

    def log_metrics(  # type: ignore[override]
        self, metrics: Mapping[str, float], step: int | None = None
    ) -> None:
        """Log scalars at the trainer's update; also write those of a validation to `validation.jsonl`."""
        at = (step or 0) if self._trainer is None else self._trainer.global_step
        validated = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
        if validated:
            with RunFolder(self.folder).validation.open("a") as file:
                file.write(json.dumps({"step": at, **validated}) + "\n")
        scalars = {**metrics, **({} if validated else self._pace(at))}
        self._attempt(lambda run: run.log([(at, scalars)]))

    def _pace(self, at: int) -> dict[str, float]:
        """Return the next update's learning rate (first parameter group) and the seconds per update."""
        if self._trainer is None or not self._trainer.training or not self._trainer.optimizers:
            return {}
        now, (before, then) = time.monotonic(), self._last
        self._last = (at, now)
        pace = {"run/learning_rate": float(self._trainer.optimizers[0].param_groups[0]["lr"])}
        if 0 < before < at:
            pace["run/seconds"] = (now - then) / (at - before)
        return pace

    def finalize(self, status: str) -> None:
        """Mark the MLflow run as FAILED after an error, or as KILLED if the process was stopped.

        Args:
            status: "failed" or "KILLED". Lightning's "success" comes after each part of a run, and is
                ignored.
        """
        stopped = isinstance(sys.exc_info()[1], SIGTERMException | KeyboardInterrupt | SystemExit)
        if status == "KILLED" or (status == "failed" and stopped):
            self._end("KILLED")
        elif status == "failed":
            self._end("FAILED")

    def conclude(self, paths: list[Path], metrics: Mapping[str, float]) -> None:
        """Add what MLflow lacks, the final numbers and the files, and mark the run as FINISHED."""
        step = 0 if self._trainer is None else self._trainer.global_step
        lacking, self.off = self.off, False

        def bring(run: Run) -> None:
            """Add the configuration and scalars that are missing, then the files."""
            if lacking:
                run.describe(self._config)
            run.log_missing([*(rows(self.folder) if lacking else []), (step, dict(metrics))])
            run.attach(paths, self.checkpoints)

        self._attempt(bring, said=lacking)
        if lacking and not self.off:
            print("MLflow: it responds again; the configuration and all scalars were added", flush=True)
        self._end("FINISHED")

    def _attempt(self, act: Callable[[Run], object], said: bool = False) -> None:
        """Call `act` with the MLflow run; on a failure, print it (unless `said`) and turn MLflow off."""
        if self.off:
            return
        try:
            act(self._begun())
        except failures() as error:
            self.off = True
            if not said:
                print(
                    f"MLflow: {reason(error)}; scalars are written to {RunFolder(self.folder).history}; "
                    f"add them to MLflow later with: python -m segrl.track {self.folder}",
                    flush=True,
                )

    def _begun(self) -> Run:
        """Return the MLflow run: the one that the folder names, or a new one with the folder's scalars."""
        if self.run is None:
            file = RunFolder(self.folder).mlflow_run_id
            known = file.read_text(errors="replace").strip() if file.is_file() else None
            self.run = Run.begin(self.place, self.folder, self.tags, known, self.run_name)
            atexit.register(self._end, "KILLED")
            if self.run.run_id != known:
                file.write_text(self.run.run_id)
                self.run.log_missing(rows(self.folder))
        return self.run

    def _end(self, status: str) -> None:
        """Set the final status of the MLflow run."""
        atexit.unregister(self._end)
        if self.run is not None:
            self._attempt(lambda run: run.end(status))


def rows(folder: Path) -> Rows:
    """Return the scalars in a run folder: of updates, and of validations."""
    from segrl.tracking.callbacks import read_history

    lines = [*read_history(RunFolder(folder).history), *read_history(RunFolder(folder).validation)]
    return [(int(line["step"]), {k: v for k, v in line.items() if k != "step"}) for line in lines]
