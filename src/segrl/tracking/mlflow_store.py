"""MLflow's database or server: opened once at a time, and what a run writes into it.

Everything here may raise one of `failures()`; who calls it says so, and goes on.
"""

from __future__ import annotations

import contextlib
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

_PARAMS, _METRICS = 100, 1000  # that MLflow takes in one call
_VALUE = 250  # characters that it keeps of a parameter
_SECONDS = 10.0  # that a locked database is waited for at the start

Rows = list[tuple[int, dict[str, float]]]
"""Scalars by update."""


def quiet() -> None:
    """No telemetry, no log lines of a migration, no traceback of what is told in one line, and a server that is gone is given up soon."""
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
    """Return what MLflow, its database, its migrations and its server raise, and what `Place.connect` makes of it."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, CannotTrackError)


class CannotTrackError(ValueError):
    """No run can begin where `logger.tracking_uri` points; one line that names the key."""


def reason(error: BaseException) -> str:
    """One short line."""
    text = str(error).partition("(Background on this error")[0].partition("[SQL:")[0]
    return " ".join(text.split())[:200].rstrip(" .") or type(error).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where runs are tracked.

    Args:
        tracking_uri: `sqlite:///PATH`, the path as it is, or anything else that MLflow takes.
        artifacts: folder of a new experiment's files.
        experiment: name.
    """

    tracking_uri: str
    artifacts: str
    experiment: str

    @property
    def database(self) -> Path | None:
        """The file of an sqlite database; None for a server."""
        path = self.tracking_uri.removeprefix("sqlite:///")
        return None if path == self.tracking_uri else Path(path)

    @property
    def url(self) -> str:
        """The address as SQLAlchemy reads it: it decodes `%`, and cuts a path at `?`. Said with a driver, MLflow leaves its folder alone."""
        if self.database is None or not {"%", "?"} & set(self.tracking_uri):
            return self.tracking_uri
        from sqlalchemy import URL

        return URL.create("sqlite+pysqlite", database=str(self.database)).render_as_string()

    def connect(self) -> tuple[MlflowClient, str]:
        """Open the database, made if missing, and find the experiment, made if missing, restored if deleted: client and id.

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
                f"paths.runs: it must be a folder that can be written, for MLflow's database stands in it; {file} cannot be made "
                f"({str(error.strerror).lower()})"
            ) from None
        try:
            with _one_at_a_time(file):
                return self._opened()
        except failures() as error:
            raise CannotTrackError(
                f"logger.tracking_uri: MLflow must be able to begin a run in {self.tracking_uri}; {reason(error)} (mend it, name another "
                "with logger.tracking_uri, or go without MLflow: logger=csv)"
            ) from None

    def _opened(self) -> tuple[MlflowClient, str]:
        if self.database is not None:
            # A connection that is kept would go on writing into a file that is deleted.
            os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
            _probe(self.database)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.url)
        return client, self._experiment(client)

    def _experiment(self, client: MlflowClient) -> str:
        """Id of the experiment."""
        from mlflow.exceptions import MlflowException

        known = client.get_experiment_by_name(self.experiment)
        if known is None:
            try:
                made: str = client.create_experiment(self.experiment, Path(self.artifacts).resolve().as_uri())
                return made
            except MlflowException:  # another machine's run made it in between
                known = client.get_experiment_by_name(self.experiment)
                if known is None:
                    raise
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
            print(f"MLflow: the experiment {self.experiment} was deleted; it is restored", flush=True)
        found: str = known.experiment_id
        return found


@contextlib.contextmanager
def _one_at_a_time(file: Path | None) -> Iterator[None]:
    """Inside, no other process of this machine opens the database: the first one makes its tables."""
    if file is None:
        yield
        return
    import fcntl

    with file.with_name(f".{file.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _probe(file: Path) -> None:
    """Raise sqlite3.Error where nothing can be written; MLflow would try for minutes."""
    connection = sqlite3.connect(file, timeout=_SECONDS, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of an experiment."""

    client: MlflowClient
    experiment_id: str
    run_id: str

    @classmethod
    def begin(cls, place: Place, folder: Path, tags: Mapping[str, str], run_id: str | None, name: str) -> Run:
        """Go on with a run, restored if it was deleted, or create one where `run_id` is None or not in this database."""
        client, experiment = place.connect()
        known = None if run_id is None else _known(client, run_id)
        if known is not None:
            if known.info.lifecycle_stage == "deleted":
                client.restore_run(known.info.run_id)
                print(f"MLflow: the run of {folder} was deleted; it is restored", flush=True)
            client.update_run(known.info.run_id, status="RUNNING")
            return cls(client=client, experiment_id=known.info.experiment_id, run_id=known.info.run_id)
        if run_id is not None:
            said = f"there is no run {run_id}" if run_id else "mlflow_run_id is empty"
            print(f"MLflow: {said} for {folder}; a new one is made", flush=True)
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
        """Log those scalars that the run has no value of at their update; returns how many."""
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
        """Log a configuration as parameters; those that the run has stay, for MLflow's are written once."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        params = [Param(k, str(v)[:_VALUE]) for k, v in flat(config).items() if k not in known]
        for some in _batches(params, _PARAMS):
            self.client.log_batch(self.run_id, params=some)

    def attach(self, paths: Iterable[Path], checkpoints: bool) -> None:
        """Copy files and folders into the run's artifacts; of checkpoints the path alone, as a tag, unless they are wanted."""
        for path in paths:
            if path.name == "checkpoints" and not checkpoints:
                if path.is_dir():
                    self.client.set_tag(self.run_id, "checkpoints", str(path.resolve()))
            elif path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), path.name)
            elif path.is_file():
                self.client.log_artifact(self.run_id, str(path))

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED (stopped, after saving: it may go on)."""
        self.client.set_terminated(self.run_id, status)


def _known(client: MlflowClient, run_id: str) -> Any:  # noqa: ANN401 - mlflow's Run
    """The run of an id; None where the database has none."""
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
    """Return the leaves of a nested mapping, by keys joined with `/`."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _named(metric: str) -> str:
    """Return the name as MLflow takes it: `p@.5` loses its sign."""
    return re.sub(r"[^a-zA-Z0-9_/. -]+", "", metric)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
