"""`python -m segrl.evaluate +experiment=NAME init_from=CHECKPOINT`: score a policy on a dataset's test sets, without training."""

from __future__ import annotations

from omegaconf import DictConfig

from segrl.front_door import check, enter


def job(cfg: DictConfig) -> float | None:
    """One evaluation; the value that a sweep compares comes back."""
    for key in ("ckpt_path", "resume"):
        if cfg[key] is not None:
            raise ValueError(
                f"{key}: to score a policy, init_from=CHECKPOINT is needed; {key} goes on with a training"
            )
    check(cfg)
    cfg.data.batch_size = 1  # nothing is trained: a training set of any size will do
    from segrl.running import Run

    run = Run.build(cfg)
    run.announce()
    return run.score()


def main() -> None:
    """Entry point."""
    enter("evaluate", job)


if __name__ == "__main__":
    main()
