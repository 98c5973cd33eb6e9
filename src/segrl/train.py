"""`python -m segrl.train +experiment=NAME`: train a policy, and score it before and after."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from segrl.host.signals import Stopped, held
from segrl.runs.command import enter
from segrl.runs.configuration import check, experiments, take_in_instructions
from segrl.runs.resuming import resumed

if TYPE_CHECKING:
    from segrl.runs.training import Run


def job(cfg: DictConfig) -> float | None:
    """Run one training.

    Returns:
        The score `objective_metric`, which a sweep compares; None if it is unset.

    Raises:
        ValueError: if the configuration or a file is wrong.
        Stopped: after a signal, once what is saved has been reported.
    """
    from hydra.core.hydra_config import HydraConfig

    if cfg.resume is not None:
        cfg = resumed(cfg, list(HydraConfig.get().overrides.task))
    check(cfg)
    take_in_instructions(cfg)
    from segrl.runs.training import Run

    run: Run = Run.build(cfg)
    try:
        run.open()
        run.announce()
        run.test_before()
        run.fit()
        return run.finish()
    except Stopped as stop:
        with held():
            run.stopped(stop)
        raise


def main() -> None:
    """Run the command line."""
    if len(sys.argv) == 1:
        print(
            f"segrl: experiment: must be given as +experiment=NAME; there are: {', '.join(experiments())}",
            file=sys.stderr,
        )
        sys.exit(2)
    enter("train", job)


if __name__ == "__main__":
    main()
