"""Report a batch size that is not the experiment's, and test sets that have not the published size."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from segrl.protocols import SampleSet


def of_batch(cfg: DictConfig, ranks: int) -> list[str]:
    """Return one line if ranks x `data.batch_size` is not `data.global_batch`, else no line.

    Args:
        cfg: configuration of the run; an old one may have no `data.global_batch`, which gives no line.
        ranks: number of training processes, each with its own batch.
    """
    whole: int | None = OmegaConf.select(cfg, "data.global_batch")
    one = int(cfg.data.batch_size)
    if whole is None or ranks * one == whole:
        return []
    has = (
        f"{ranks} rank{'s' if ranks > 1 else ''} x {one} = {ranks * one} samples per batch; "
        f"the experiment has {whole}"
    )
    if whole % ranks:
        return [f"{has}, which {ranks} ranks cannot divide evenly"]
    return [f"{has} (data.batch_size={whole // ranks} keeps {whole})"]


def published(cfg: DictConfig, name: str) -> int | None:
    """Return the published number of samples of a test set, or None if it is unknown.

    Args:
        cfg: configuration of a run or an evaluation.
        name: one of `testsets` or, if there are none, of the test sets of `data`.
    """
    own = OmegaConf.select(cfg, "testsets") or {}
    count: int | None = OmegaConf.select(
        cfg, f"testsets.{name}.published" if own else f"data.published.{name}"
    )
    return count


def of_counts(cfg: DictConfig, sets: Mapping[str, SampleSet]) -> list[str]:
    """Return one line for each test set whose number of samples is not the published one."""
    counts = {name: (published(cfg, name), len(samples)) for name, samples in sets.items()}
    return [
        f"{name}: {owners:,} samples are published, {here:,} were found: "
        "its scores cannot be compared with published ones "
        "(python -m segrl.prepare check examines a download)"
        for name, (owners, here) in counts.items()
        if owners is not None and owners != here
    ]
