"""One MLflow run above all jobs of a Hydra multirun, and the table of the jobs when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepParent(Callback):
    """Hydra callback; see `conf/train.yaml`. Does nothing in a single run."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float | None]] = []
        self.run_id: str | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401 - Hydra's signature
        """Open the parent run, where runs are tracked by MLflow."""
        if "tracking_uri" not in config.logger:
            return
        from segrl.tracking.mlflow_runs import open_parent

        Path(config.paths.runs).mkdir(parents=True, exist_ok=True)
        tags = {
            "overrides": " ".join(config.hydra.overrides.task),
            "objective_metric": str(config.objective_metric),
        }
        self.run_id = open_parent(config.logger.tracking_uri, config.logger.artifacts, config.name, tags)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ANN401
        """Take down a job's objective."""
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else None
        self.rows.append((" ".join(job_return.overrides or []), value if isinstance(value, float) else None))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401
        """Print the jobs, best objective first, and close the parent run."""
        ranked = sorted(self.rows, key=lambda row: -(row[1] if row[1] is not None else float("-inf")))
        print(f"\n{len(ranked)} jobs by {config.objective_metric}")
        for name, value in ranked:
            print(f"  {'none' if value is None else format(value, '.4f'):>8}  {name}")
        if self.run_id is not None:
            from segrl.tracking.mlflow_runs import close_parent

            best, objective = ranked[0] if ranked else ("", None)
            close_parent(config.logger.tracking_uri, self.run_id, best, objective)
