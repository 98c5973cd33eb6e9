"""MLflow runs: one per training, continued after a resume, and one parent per sweep.

If MLflow fails, a new run or sweep and `bring_in` raise an error; elsewhere the failure is printed and the
run continues.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segrl.tracking.mlflow_store import CannotTrackError, Place, Run, failures, reason
from segrl.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, Logger

_PARENT = "SEGRL_PARENT_RUN"
_JOB = "SEGRL_JOB_NAME"


def open_logger(
    folder: Path, tags: Mapping[str, str], *, tracking_uri: str, artifacts: str, experiment: str,
    checkpoints: bool = False,
) -> Logger:  # fmt: skip
    """Return the logger of a run folder, which need not exist yet; it creates its MLflow run when used.

    Raises:
        ValueError: naming the key, if a new run cannot be tracked. For a resumed run the logger prints that
            instead.
    """
    from segrl.tracking.mlflow_logger import MlflowRun

    if not isinstance(checkpoints, bool):
        raise ValueError(f"logger.checkpoints: must be true or false; got {checkpoints!r}")
    of = RunFolder(folder)
    place = Place(tracking_uri=tracking_uri, artifacts=artifacts, experiment=experiment)
    if not any(path.is_file() for path in (of.mlflow_run_id, of.history)):
        place.connect()
    parent = {"mlflow.parentRunId": os.environ[_PARENT]} if _PARENT in os.environ else {}
    return MlflowRun(
        place, folder, {**tags, **parent}, os.environ.get(_JOB, folder.absolute().name), checkpoints
    )


def open_csv(folder: Path, tags: Mapping[str, str]) -> CSVLogger:
    """Return a logger that writes scalars into `metrics.csv` of the run folder."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder, name="", version="")


def keep(logger: Logger | None, paths: list[Path], metrics: Mapping[str, float]) -> None:
    """Log a run's final numbers; in MLflow, also copy the files into the artifacts and end the run."""
    from segrl.tracking.mlflow_logger import MlflowRun

    if isinstance(logger, MlflowRun):
        logger.conclude(paths, metrics)
    elif logger is not None:
        logger.log_metrics(dict(metrics))


def where(logger: Logger | None, runs: str) -> str:
    """Return the line that says how to open a finished run in MLflow; an empty string without MLflow."""
    from segrl.tracking.mlflow_logger import MlflowRun

    if not isinstance(logger, MlflowRun):
        return ""
    if logger.off or logger.run is None:
        return f"MLflow lacks a part of this run; add it with: python -m segrl.track {logger.folder}"
    return f"open MLflow: make mlflow{'' if runs == 'runs' else f' RUNS={runs}'}, then {link(logger.run)}"


def link(run: Run) -> str:
    """Return the URL of a run's page under `make mlflow`; without its query MLflow shows traces of chats."""
    return (
        f"http://127.0.0.1:5000/#/experiments/{run.experiment_id}/runs/{run.run_id}"
        "?workflowType=machine_learning"
    )


def bring_in(folder: Path, place: Place, config: Mapping[str, object], checkpoints: bool) -> tuple[Run, int]:
    """Add a run folder to MLflow: parameters, tags, scalars, final numbers, files; idempotent.

    Args:
        folder: folder of a run or an evaluation.
        place: database and experiment.
        config: the run's resolved configuration.
        checkpoints: whether checkpoints are copied, too.

    Returns:
        The MLflow run, and the number of scalars that were added.

    Raises:
        ValueError: if MLflow cannot be written, or a file of the folder is damaged.
    """
    from segrl.tracking.mlflow_logger import rows

    of = RunFolder(folder)
    tags = {str(k): str(v) for k, v in _json(of.provenance).items()}
    final, named = _json(of.metrics), of.mlflow_run_id
    known = named.read_text(errors="replace").strip() if named.is_file() else None
    try:
        run = Run.begin(place, folder, tags, known, folder.absolute().name)
        named.write_text(run.run_id)
        run.describe(config)
        steps = final.get("steps")  # an evaluation has none
        step = steps if isinstance(steps, int) else 0
        added = run.log_missing([*rows(folder), *([(step, numbers(final))] if final else [])])
        run.attach(of.artifacts, checkpoints)
        run.end("FINISHED" if final else "KILLED")
    except failures() as error:
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{folder}: must be added to MLflow; it failed: {reason(error)}") from None
    return run, added


def _json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if there is no file. Raise ValueError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        held = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: must be JSON; {reason(error)}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{file}: must be a JSON object; it is a {type(held).__name__}")
    return held


def numbers(final: Mapping[str, object]) -> dict[str, float]:
    """Return the final numbers of a run's or an evaluation's `metrics.json` by their logged names."""
    found = _node(final.get("metrics")) | {"objective": final.get("objective")}
    for name, scored in _node(final.get("datasets")).items():
        one = _node(scored)
        found |= {
            f"test/{name}/{key}": _node(score).get("value") for key, score in _node(one.get("scores")).items()
        }
        found[f"test/{name}/fault_rate"] = one.get("fault_rate")
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _node(value: object) -> dict[str, object]:
    """Return a mapping as a dictionary, and {} for any other value."""
    return dict(value) if isinstance(value, Mapping) else {}


def open_parent(place: Place, tags: Mapping[str, str]) -> Run:
    """Create the parent run of a sweep's jobs, which find its id in the environment until `close_parent`.

    Raises:
        ValueError: naming the key, if the sweep cannot be tracked.
    """
    client, experiment = place.connect()
    try:
        made = client.create_run(experiment, run_name="sweep", tags=dict(tags))
    except failures() as error:
        raise CannotTrackError(
            "logger.tracking_uri: must be a database or server in which MLflow can start the sweep's run; "
            f"it failed: {reason(error)} (repair it, or use logger=csv)"
        ) from None
    os.environ[_PARENT] = made.info.run_id
    return Run(client=client, experiment_id=experiment, run_id=made.info.run_id)


def close_parent(run: Run, best: str, objective: float | None, status: str) -> None:
    """End the parent run of a sweep, with the best job as a tag; print a failure of MLflow."""
    os.environ.pop(_PARENT, None)
    try:
        if best:
            run.client.set_tag(run.run_id, "best", best)
        if objective is not None:
            run.client.log_metric(run.run_id, "objective", objective)
        run.end(status)
    except failures() as error:
        print(f"MLflow: {reason(error)}; the sweep's parent run was not closed", flush=True)


def name_job(name: str | None) -> None:
    """Set the name of the run that the next `open_logger` creates; if None, it is the folder's name."""
    if name is None:
        os.environ.pop(_JOB, None)
    else:
        os.environ[_JOB] = name


def fail_job(place: Place, folder: Path) -> None:
    """Mark the MLflow run of a failed job as FAILED, if there is one; print a failure of MLflow."""
    named = RunFolder(folder).mlflow_run_id
    if named.is_file():
        try:
            client, experiment = place.connect()
            Run(client=client, experiment_id=experiment, run_id=named.read_text()).end("FAILED")
        except failures() as error:
            print(f"MLflow: {reason(error)}; the run of {folder} was not closed", flush=True)
