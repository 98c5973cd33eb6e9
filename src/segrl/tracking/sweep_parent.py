"""Hydra callback of a multirun: parent run in MLflow, messages about jobs, table of results."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from segrl.host import signals
from segrl.metrics.direction import higher_is_better
from segrl.tracking.provenance import JOB_OVERRIDES
from segrl.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from segrl.tracking.mlflow_store import Place, Run


class JobFailedError(ValueError):
    """Error of a sweep's job that was refused or failed, with a message of one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Result of a job that has ended."""

    job: int
    differs: str
    objective: float | None
    failed: str
    """Reason of a failure; an empty string after a success."""
    folder: str


class SweepParent(Callback):
    """Hydra callback, set in `conf/train.yaml`. It does nothing in a single run.

    A failed job does not end the others. Its error is printed at once, and Hydra's BasicSweeper, which would
    raise it again, gets None as the job's result. The process then exits with 1. After a job that was
    stopped, the remaining ones are skipped: they have no row, and the parent run is KILLED. Jobs may run in
    other processes (hydra-joblib-launcher), so each appends its row to `jobs.jsonl` in the sweep's folder. A
    second sweep that runs in the same folder writes `jobs-2.jsonl` and `table-2.md`.
    """

    def __init__(self) -> None:
        self.parent: Run | None = None
        self.swept: list[str] = []
        self.total: int | None = None
        self.failed = False
        self.jobs = Path("jobs.jsonl")  # rows of this sweep; set to a locked file when it starts
        self.skips = False  # whether the next job is skipped, because the sweep was stopped
        self.others = ""  # run folder that existed before the job started

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401 - Hydra's own
        """Open the parent run if MLflow is used; if that fails, print one line and exit with 2."""
        self.swept, self.total = _swept(config)
        tags = {
            "overrides": " ".join(config.hydra.overrides.task),
            "objective_metric": str(config.objective_metric),
        }
        if (place := _place(config)) is not None:
            from segrl.tracking.mlflow_runs import open_parent
            from segrl.tracking.mlflow_store import CannotTrackError

            try:
                self.parent = open_parent(place, tags)
            except CannotTrackError as error:
                print(f"segrl: {error}", file=sys.stderr)
                sys.exit(2)
        self.jobs = _claimed(Path(config.hydra.sweep.dir))
        atexit.register(self._end, config, "KILLED")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401
        """Print which job starts, and name its run by the keys that differ."""
        if not self._sweeps:
            return
        self.skips = signals.asked() is not None
        if self.skips:
            return
        from segrl.tracking.mlflow_runs import name_job

        differs = _differs(list(config.hydra.overrides.task), self.swept)
        of = "" if self.total is None else f" of {self.total}"
        print(f"\njob {config.hydra.job.num + 1}{of}: {differs}", flush=True)
        name_job(differs)
        os.environ[JOB_OVERRIDES] = json.dumps(list(config.hydra.overrides.task))
        folder = str(config.paths.run)
        self.others = folder if Path(folder).exists() else ""

    @property
    def _sweeps(self) -> bool:
        """Whether this is a multirun."""
        return bool(self.swept) or self.total is not None

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ANN401
        """Write the row of a job: its objective, or why it failed."""
        if not self._sweeps or self.skips:
            return
        value = job_return._return_value  # the property return_value raises if the job failed
        folder = "" if job_return.cfg is None else str(job_return.cfg.paths.run)
        if folder == self.others or not Path(folder).is_dir():
            folder = ""
        why = ""
        if job_return.status is JobStatus.FAILED:
            why = " ".join(str(value).split()) if isinstance(value, JobFailedError) else _told(value)
            print(f"segrl: job {config.hydra.job.num + 1} failed: {why}", file=sys.stderr, flush=True)
            if folder and (place := _place(config)) is not None:
                from segrl.tracking.mlflow_runs import fail_job

                fail_job(place, Path(folder))
            if "BasicSweeper" in config.hydra.sweeper._target_:
                job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        objective = value if isinstance(value, float) and not isnan(value) else None
        row = Row(
            job=config.hydra.job.num + 1, differs=_differs(list(job_return.overrides or []), self.swept),
            objective=objective, failed=why, folder=folder,
        )  # fmt: skip
        with self.jobs.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401
        """Print the table and close the parent run; exit with 1 if a job failed and no signal came."""
        stopped = signals.asked() is not None
        self._end(config, "KILLED" if stopped else "FINISHED")
        if self.failed and not stopped:
            sys.exit(1)

    def _end(self, config: DictConfig, status: str) -> None:
        """Print and write the table, best job first, and close the parent run; also called at exit."""
        from segrl.tracking.mlflow_runs import close_parent, name_job

        atexit.unregister(self._end)
        name_job(None)
        os.environ.pop(JOB_OVERRIDES, None)
        lines = self.jobs.read_text().splitlines() if self.jobs.is_file() else []
        rows = [Row(**json.loads(line)) for line in lines]
        self.failed = any(row.failed for row in rows)
        rows = ranked(rows, config.objective_metric)
        if rows:
            text = table(rows, config.objective_metric)
            file = self.jobs.with_name(self.jobs.name.replace("jobs", "table")).with_suffix(".md")
            file.write_text(text)
            print(f"\n{text}\ntable in {file}", flush=True)
        if self.parent is not None:
            first = rows[0] if rows and rows[0].objective is not None else None
            best, objective = ("", None) if first is None else (first.differs, first.objective)
            close_parent(self.parent, best, objective, status)


def _claimed(folder: Path) -> Path:
    """Return an empty file for the rows of a sweep, locked until this process ends.

    If another sweep in the same folder has locked `jobs.jsonl`, the next number is tried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        file = folder / ("jobs.jsonl" if number == 1 else f"jobs-{number}.jsonl")
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                number += 1
                continue  # after any other error: the file system has no locks
        os.ftruncate(descriptor, 0)
        return file


def ranked(rows: Sequence[Row], metric: str | None) -> list[Row]:
    """Return the jobs by objective, best first; those without an objective come last, in their order."""
    sign = -1 if higher_is_better(metric or "") else 1
    scored = [row for row in rows if row.objective is not None]
    rest = sorted((row for row in rows if row.objective is None), key=lambda row: row.job)
    return sorted(scored, key=lambda row: (sign * (row.objective or 0.0), row.job)) + rest


def table(rows: Sequence[Row], metric: str | None) -> str:
    """Return a Markdown table of the jobs, and below it the reasons of failures."""
    title = f"{len(rows)} jobs by {metric}"
    if metric is not None:
        title += f" ({'more' if higher_is_better(metric) else 'less'} is better)"
    elif known := _metrics(rows):
        title = (
            f"{len(rows)} jobs; objective_metric={known[0]} compares them (or another of {', '.join(known)})"
        )
    cells = [("job", "overrides", "objective", "run folder"), ("---",) * 4]
    for row in rows:
        objective = "failed" if row.failed else "none" if row.objective is None else f"{row.objective:.4f}"
        cells.append((str(row.job), row.differs.replace("|", "\\|"), objective, row.folder or "none"))
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    failed = [f"job {row.job} ({row.differs}) failed: {row.failed}" for row in rows if row.failed]
    return "\n".join([title, "", *lines, *([""] if failed else []), *failed]) + "\n"


def _metrics(rows: Sequence[Row]) -> list[str]:
    """Return the names of the test scores in the first `metrics.json` of a job, S-measures first."""
    from segrl.tracking.mlflow_runs import numbers

    for row in rows:
        file = RunFolder(Path(row.folder)).metrics
        if row.folder and file.is_file():
            names = [name for name in numbers(json.loads(file.read_text())) if name.startswith("test/")]
            return sorted(names, key=lambda name: not name.endswith("/sm"))
    return []


def _swept(config: DictConfig) -> tuple[list[str], int | None]:
    """Return the swept keys, and the number of jobs; None unless the sweeper is Hydra's BasicSweeper."""
    said = list(config.hydra.overrides.task)
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    said += [f"{key}={value}" for key, value in params.items()]
    sweeps = [one for one in OverridesParser.create().parse_overrides(said) if one.is_sweep_override()]
    keys = [one.get_key_element().lstrip("+") for one in sweeps]
    if "BasicSweeper" not in config.hydra.sweeper._target_:
        return keys, None
    return keys, prod(len(list(one.sweep_string_iterator())) for one in sweeps)


def _differs(overrides: Sequence[str], swept: Sequence[str]) -> str:
    """Return the swept overrides, such as `group_size=4 seed=1`; keys are shortened where unique."""
    last = [key.rpartition(".")[2] for key in swept]
    found = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in swept:
            short = key.rpartition(".")[2]
            found.append(f"{short if last.count(short) == 1 else key}={value}")
    return " ".join(found) or " ".join(overrides)


def _told(error: BaseException) -> str:
    """Print the traceback of an unexpected error to stderr, and return the error as one line."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _place(config: DictConfig) -> Place | None:
    """Return the place in which the sweep is tracked; None without MLflow."""
    if "tracking_uri" not in config.logger:
        return None
    from segrl.tracking.mlflow_store import Place

    return Place(
        tracking_uri=config.logger.tracking_uri, artifacts=config.logger.artifacts,
        experiment=config.logger.experiment,
    )  # fmt: skip
