"""Access to MLflow's database or server, which one process opens at a time, and the writes of a run.

Every access to MLflow may raise one of `failures()`, which callers handle.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_PARAMS, _METRICS = 100, 1000  # most parameters and metrics in one call of MLflow
_VALUE = 250  # characters that are kept of a parameter
_SECONDS = 10.0  # to wait for a locked database at the start

Rows = list[tuple[int, dict[str, float]]]
"""Pairs of an update and its scalars by name."""


def quiet() -> None:
    """Silence MLflow: no telemetry, no log lines of migrations, no logged tracebacks; wait less for servers.

    Environment variables that are set already are kept.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of MLflow, its database, migrations and server, and of `Place.connect`."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, CannotTrackError)


class CannotTrackError(ValueError):
    """Error of a new run that cannot be tracked; its message is one line that names the key."""


def reason(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters."""
    text = str(error).partition("(Background on this error")[0].partition("[SQL:")[0]
    return " ".join(text.split())[:200].rstrip(" .") or type(error).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Database or server, and experiment, in which runs are tracked.

    Args:
        tracking_uri: `sqlite:///PATH` with an unescaped path, or any other URI that MLflow accepts.
        artifacts: folder for the files of a new experiment.
        experiment: name of the experiment.
    """

    tracking_uri: str
    artifacts: str
    experiment: str

    @property
    def database(self) -> Path | None:
        """File of an sqlite database; None for other URIs."""
        path = self.tracking_uri.removeprefix("sqlite:///")
        return None if path == self.tracking_uri else Path(path)

    @property
    def url(self) -> str:
        """URI in which `%` and `?` of the database's path are escaped, as SQLAlchemy requires.

        It names the driver, so that MLflow does not create a folder with the escaped name.
        """
        if self.database is None or not {"%", "?"} & set(self.tracking_uri):
            return self.tracking_uri
        from sqlalchemy import URL

        return URL.create("sqlite+pysqlite", database=str(self.database)).render_as_string()

    def connect(self) -> tuple[MlflowClient, str]:
        """Return a client and the experiment's id; create the experiment if missing, restore it if deleted.

        Raises:
            CannotTrackError: naming the key, if runs cannot be tracked there.
        """
        quiet()
        file = self.database
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotTrackError(
                "paths.runs: must be a writable folder, because it holds MLflow's database; "
                f"{file} cannot be created ({str(error.strerror).lower()})"
            ) from None
        if file is not None:  # slow import: do it before locking the database
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        try:
            with _one_at_a_time(file):
                return self._opened()
        except failures() as error:
            raise CannotTrackError(
                f"logger.tracking_uri: must be a database or server in which MLflow can start a run; "
                f"got {self.tracking_uri}: {reason(error)} (repair it, set another, or use logger=csv)"
            ) from None

    def _opened(self) -> tuple[MlflowClient, str]:
        if self.database is not None:
            # A pooled connection would continue to write into a database file that was deleted.
            os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
            _probe(self.database)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.url)
        return client, self._experiment(client)

    def _experiment(self, client: MlflowClient) -> str:
        """Return the experiment's id; create or restore the experiment if needed."""
        from mlflow.exceptions import MlflowException

        known = client.get_experiment_by_name(self.experiment)
        if known is None:
            try:
                made: str = client.create_experiment(self.experiment, Path(self.artifacts).resolve().as_uri())
                return made
            except MlflowException:  # a run on another machine has created it meanwhile
                known = client.get_experiment_by_name(self.experiment)
                if known is None:
                    raise
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
            print(f"MLflow: restored the deleted experiment {self.experiment}", flush=True)
        found: str = known.experiment_id
        return found


@contextlib.contextmanager
def _one_at_a_time(file: Path | None) -> Iterator[None]:
    """Lock the database against other processes of this machine: the first one creates its tables."""
    if file is None:
        yield
        return
    import fcntl

    with file.with_name(f".{file.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _probe(file: Path) -> None:
    """Raise sqlite3.Error if the database cannot be written; MLflow would retry for minutes."""
    connection = sqlite3.connect(file, timeout=_SECONDS, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """MLflow run of an experiment."""

    client: MlflowClient
    experiment_id: str
    run_id: str

    @classmethod
    def begin(cls, place: Place, folder: Path, tags: Mapping[str, str], run_id: str | None, name: str) -> Run:
        """Return the run `run_id`, restored if deleted; create one if it is None or not in the database."""
        client, experiment = place.connect()
        known = None if run_id is None else _known(client, run_id)
        if known is not None:
            if known.info.lifecycle_stage == "deleted":
                client.restore_run(known.info.run_id)
                print(f"MLflow: restored the deleted run of {folder}", flush=True)
            client.update_run(known.info.run_id, status="RUNNING")
            return cls(client=client, experiment_id=known.info.experiment_id, run_id=known.info.run_id)
        if run_id is not None:
            why = f"there is no run {run_id}" if run_id else "mlflow_run_id is empty"
            print(f"MLflow: created a new run for {folder}, because {why}", flush=True)
        made = client.create_run(experiment, run_name=name, tags={**tags, "run_folder": str(folder)})
        return cls(client=client, experiment_id=experiment, run_id=made.info.run_id)

    def log(self, rows: Rows) -> None:
        """Log scalars by update."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_named(k), float(v), now, step) for step, row in rows for k, v in row.items()]
        for some in _batches(metrics, _METRICS):
            self.client.log_batch(self.run_id, metrics=some)

    def log_missing(self, rows: Rows) -> int:
        """Log the scalars for which the run has no value at their update; return their number."""
        steps = {
            name: {point.step for point in self.client.get_metric_history(self.run_id, name)}
            for name in {_named(key) for _, row in rows for key in row}
        }
        left: dict[tuple[str, int], float] = {
            (key, step): value
            for step, row in rows
            for key, value in row.items()
            if step not in steps[_named(key)]
        }
        self.log([(step, {key: value}) for (key, step), value in left.items()])
        return len(left)

    def describe(self, config: Mapping[str, Any]) -> None:
        """Log a configuration as parameters; keep those that the run has: MLflow writes them once."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        params = [Param(k, str(v)[:_VALUE]) for k, v in flat(config).items() if k not in known]
        for some in _batches(params, _PARAMS):
            self.client.log_batch(self.run_id, params=some)

    def attach(self, paths: Iterable[Path], checkpoints: bool) -> None:
        """Copy files and folders into the artifacts; unless `checkpoints`, only tag the checkpoints' path."""
        for path in paths:
            if path.name == "checkpoints" and not checkpoints:
                if path.is_dir():
                    self.client.set_tag(self.run_id, "checkpoints", str(path.resolve()))
            elif path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), path.name)
            elif path.is_file():
                self.client.log_artifact(self.run_id, str(path))

    def end(self, status: str) -> None:
        """Set the status: FINISHED, FAILED, or KILLED (stopped after saving, so that it can be resumed)."""
        self.client.set_terminated(self.run_id, status)


def _known(client: MlflowClient, run_id: str) -> Any:  # noqa: ANN401 - mlflow's Run
    """Return the MLflow run of an id, or None if the database has none."""
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"[\w-]+", run_id):
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping by their keys joined with `/`."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _named(metric: str) -> str:
    """Return the name without characters that MLflow refuses, such as the `@` of `p@.5`."""
    return re.sub(r"[^a-zA-Z0-9_/. -]+", "", metric)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
