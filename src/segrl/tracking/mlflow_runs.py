"""MLflow on sqlite: one run per training, gone on with after a resume; one parent per sweep."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger

_PARENT = "SEGRL_PARENT_RUN"
_RUN_ID = "mlflow_run_id"


def quiet() -> None:
    """No telemetry, and no log lines of the database's first migration."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def open_logger(
    folder: Path, tags: Mapping[str, str], *, tracking_uri: str, artifacts: str, experiment: str
) -> MLFlowLogger:
    """The run that belongs to a run folder: a new one, or the one that the folder already names."""
    quiet()
    from lightning.pytorch.loggers import MLFlowLogger

    remembered = folder / _RUN_ID
    parent = os.environ.get(_PARENT)
    logger = MLFlowLogger(
        experiment_name=experiment,
        run_name=folder.name,
        tracking_uri=tracking_uri,
        artifact_location=Path(artifacts).resolve().as_uri(),
        tags={**tags, "run_folder": str(folder), **({"mlflow.parentRunId": parent} if parent else {})},
        run_id=remembered.read_text().strip() if remembered.is_file() else None,
    )
    remembered.write_text(str(logger.run_id))
    return logger


def open_csv(folder: Path, tags: Mapping[str, str]) -> CSVLogger:
    """Scalars in `metrics.csv` of the run folder, and no database."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder, name="", version="")


def keep(logger: Logger | None, paths: list[Path], metrics: Mapping[str, float]) -> None:
    """Copy files into the run's artifacts, and log its final numbers."""
    from lightning.pytorch.loggers import MLFlowLogger

    if logger is None:
        return
    logger.log_metrics(dict(metrics))
    if isinstance(logger, MLFlowLogger):
        for path in paths:
            if path.is_dir():
                logger.experiment.log_artifacts(logger.run_id, str(path), path.name)
            elif path.is_file():
                logger.experiment.log_artifact(logger.run_id, str(path))


def open_parent(tracking_uri: str, artifacts: str, experiment: str, tags: Mapping[str, str]) -> str:
    """Create the run above a sweep's jobs; they find its id in the environment until `close_parent`."""
    quiet()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri)
    known = client.get_experiment_by_name(experiment)
    home = (
        known.experiment_id
        if known
        else client.create_experiment(experiment, Path(artifacts).resolve().as_uri())
    )
    run_id: str = client.create_run(home, run_name="sweep", tags=dict(tags)).info.run_id
    os.environ[_PARENT] = run_id
    return run_id


def close_parent(tracking_uri: str, run_id: str, best: str, objective: float | None) -> None:
    """End the run above a sweep's jobs, and say which job was best."""
    from mlflow.tracking import MlflowClient

    os.environ.pop(_PARENT, None)
    client = MlflowClient(tracking_uri)
    client.set_tag(run_id, "best", best)
    if objective is not None:
        client.log_metric(run_id, "objective", objective)
    client.set_terminated(run_id)
