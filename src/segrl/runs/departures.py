"""Compare a run with its experiment (batch size) and its test sets with their published counts; one line per difference."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from segrl.protocols import SampleSet


def of_batch(cfg: DictConfig, ranks: int) -> list[str]:
    """Return a line where ranks x `data.batch_size` is not the experiment's batch, else none.

    Args:
        cfg: of the run; configurations of before have no `data.global_batch`, and nothing to hold a batch against.
        ranks: processes that learn, each from a batch of its own.
    """
    whole: int | None = OmegaConf.select(cfg, "data.global_batch")
    one = int(cfg.data.batch_size)
    if whole is None or ranks * one == whole:
        return []
    has = f"{ranks} rank{'s' if ranks > 1 else ''} x {one} = {ranks * one} samples a batch; the experiment has {whole}"
    if whole % ranks:
        return [f"{has}, which {ranks} ranks cannot share out evenly"]
    return [f"{has}: data.batch_size={whole // ranks} keeps it"]


def published(cfg: DictConfig, name: str) -> int | None:
    """Return how many samples the owners of a test set publish; `None` where that is not known.

    Args:
        cfg: of a run or an evaluation.
        name: of one of its suite's test sets or, where it has none, of its data's.
    """
    own = OmegaConf.select(cfg, "testsets") or {}
    count: int | None = OmegaConf.select(
        cfg, f"testsets.{name}.published" if own else f"data.published.{name}"
    )
    return count


def of_counts(cfg: DictConfig, sets: Mapping[str, SampleSet]) -> list[str]:
    """Return a line for each test set that holds more or fewer samples than its owners publish."""
    counts = {name: (published(cfg, name), len(samples)) for name, samples in sets.items()}
    return [
        f"{name}: {owners:,} samples are published, {here:,} are here: its scores are not the benchmark's "
        "(python -m segrl.prepare check looks into a download)"
        for name, (owners, here) in counts.items()
        if owners is not None and owners != here
    ]
