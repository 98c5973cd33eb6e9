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
        self.objective = "objective"

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401 - Hydra's signature
        """Open the parent run; the jobs find it in the environment."""
        import os

        from segrl.tracking.mlflow_runs import PARENT_VARIABLE, quiet

        self.objective = config.objective_metric or "objective"
        if not str(config.logger.get("tracking_uri", "")):
            return
        quiet()
        from mlflow.tracking import MlflowClient

        Path(config.paths.runs).mkdir(parents=True, exist_ok=True)
        client = MlflowClient(config.logger.tracking_uri)
        known = client.get_experiment_by_name(config.name)
        experiment = known.experiment_id if known else client.create_experiment(
            config.name, Path(config.logger.artifacts).resolve().as_uri()
        )  # fmt: skip
        tags = {"overrides": " ".join(config.hydra.overrides.task), "objective_metric": self.objective}
        self.run_id = client.create_run(experiment, run_name="sweep", tags=tags).info.run_id
        os.environ[PARENT_VARIABLE] = self.run_id

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ANN401
        """Take down a job's objective."""
        name = " ".join(job_return.overrides or [])
        value = job_return._return_value if job_return.status is JobStatus.COMPLETED else None
        self.rows.append((name, value if isinstance(value, float) else None))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401
        """Print the jobs, best objective first, and close the parent run."""
        import os

        from segrl.tracking.mlflow_runs import PARENT_VARIABLE

        os.environ.pop(PARENT_VARIABLE, None)
        ranked = sorted(self.rows, key=lambda row: -(row[1] if row[1] is not None else float("-inf")))
        print(f"\n{len(ranked)} jobs by {self.objective}")
        for name, value in ranked:
            print(f"  {'failed' if value is None else format(value, '.4f'):>8}  {name}")
        if self.run_id is not None:
            from mlflow.tracking import MlflowClient

            client = MlflowClient(config.logger.tracking_uri)
            for name, value in ranked[:1]:
                client.set_tag(self.run_id, "best", name)
                if value is not None:
                    client.log_metric(self.run_id, "objective", value)
            client.set_terminated(self.run_id)
