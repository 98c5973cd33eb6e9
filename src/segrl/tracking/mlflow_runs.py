"""MLflow on sqlite: one run per training, gone on with after a resume; one parent per sweep."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger

PARENT_VARIABLE = "SEGRL_PARENT_RUN"
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
    parent = os.environ.get(PARENT_VARIABLE)
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


@contextmanager
def parent_run(run_id: str) -> Iterator[None]:
    """Runs opened inside are children of `run_id`."""
    os.environ[PARENT_VARIABLE] = run_id
    try:
        yield
    finally:
        del os.environ[PARENT_VARIABLE]
