"""`python -m segrl.track RUN [RUN ...]`: add run folders to MLflow that it lacks, in whole or in part.

Adds parameters, tags, the scalars of history.jsonl and validation.jsonl, the final numbers and the files. A
second call adds nothing. Use it for runs that have ended: one that still runs is marked as KILLED until it
ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segrl.runs.configuration import register_resolvers
from segrl.runs.resuming import read
from segrl.tracking.mlflow_runs import bring_in, link
from segrl.tracking.mlflow_store import Place
from segrl.tracking.run_folder import RunFolder


def configuration(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run folder, which may come from anyone.

    Raises:
        ValueError: if the folder holds no configuration of a run, or a damaged one.
    """
    saved = RunFolder(folder).config
    if not saved.is_file():
        raise ValueError(f"RUN: must be a run folder; {folder} holds no config.yaml")
    register_resolvers()
    config = read(saved, "RUN")
    try:
        held = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{saved}: must be a run's configuration; {' '.join(str(error).split())[:160]}"
        ) from None
    if not isinstance(held, dict) or not {"name", "paths", "logger"} <= set(held):
        raise ValueError(f"{saved}: must be a run's configuration, with name, paths and logger")
    return {str(key): value for key, value in held.items()}


def place_of(config: dict[str, Any], uri: str | None, experiment: str | None) -> Place:
    """Return the place in MLflow for a run: its own or, for a run without MLflow, a database in `paths.runs`.

    Args:
        config: resolved configuration of the run.
        uri: tracking URI to use instead of the run's; None keeps it.
        experiment: name of the experiment to use instead of the run's; None keeps it.
    """
    logger, runs = dict(config["logger"]), Path(str(dict(config["paths"])["runs"]))
    return Place(
        tracking_uri=uri or str(logger.get("tracking_uri", f"sqlite:///{runs}/mlflow.db")),
        artifacts=str(logger.get("artifacts", runs / "mlflow-artifacts")),
        experiment=experiment or str(logger.get("experiment", config["name"])),
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m segrl.track", description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="run folder, such as runs/demo/2026-11-28_09-00-00")
    parser.add_argument("--tracking-uri", help="sqlite:///PATH or a server; the run's own if left out")
    parser.add_argument("--experiment", help="name in MLflow; the run's own if left out")
    parser.add_argument("--checkpoints", action="store_true", help="copy checkpoints into the artifacts, too")
    arguments = parser.parse_args()
    try:
        for folder in arguments.run:
            config = configuration(folder)
            place = place_of(config, arguments.tracking_uri, arguments.experiment)
            run, added = bring_in(folder, place, config, arguments.checkpoints)
            print(f"{folder}: {added} scalars added; make mlflow, then {link(run)}", flush=True)
    except ValueError as error:
        print(f"segrl: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
