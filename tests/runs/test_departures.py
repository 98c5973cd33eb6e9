"""A run says at its start where it departs from its experiment: its total batch, and counts of test sets."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from segrl.runs.configuration import compose_job, register_resolvers
from segrl.runs.departures import of_batch, of_counts


def composed(*overrides: str):
    register_resolvers()
    return compose_job("train", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "ranks", "line"),
    [
        (["+experiment=grpo_cod10k"], 1, None),
        (["+experiment=grpo_cod10k"], 8,
         "8 ranks x 24 = 192 samples per batch; the experiment has 24 (data.batch_size=3 keeps 24)"),
        (["+experiment=grpo_cod10k", "data.batch_size=3"], 8, None),
        (["+experiment=grpo_cod10k", "data.batch_size=1"], 16,
         "16 ranks x 1 = 16 samples per batch; the experiment has 24, which 16 ranks cannot divide evenly"),
        (["+experiment=grpo_cod10k", "data.batch_size=6"], 1,
         "1 rank x 6 = 6 samples per batch; the experiment has 24 (data.batch_size=24 keeps 24)"),
        (["+experiment=sam_r1_refcocog", "data.batch_size=4"], 8, None),
        (["+experiment=seg_zero_refcocog"], 2,
         "2 ranks x 16 = 32 samples per batch; the experiment has 16 (data.batch_size=8 keeps 16)"),
        (["+experiment=sft_fcot", "data.batch_size=16"], 8, None),
    ],
)  # fmt: skip
def test_ranks_times_batch_is_held_against_the_experiments_own(overrides, ranks, line):
    assert of_batch(composed(*overrides), ranks) == ([] if line is None else [line])


def test_a_configuration_from_before_has_nothing_to_hold_a_batch_against():
    assert of_batch(OmegaConf.create({"data": {"batch_size": 3}}), 8) == []


class Samples(list):
    """Stands for a dataset of which only the length is read."""


def test_counts_of_an_experiments_own_test_sets_are_held_against_the_published_ones():
    cfg = composed("+experiment=grpo_cod10k", "data.root=x")
    assert of_counts(cfg, {"cod10k": Samples(range(2026))}) == []
    (line,) = of_counts(cfg, {"cod10k": Samples(range(40))})
    assert line.startswith("cod10k: 2,026 samples are published, 40 were found: ") and "prepare check" in line
    assert of_counts(composed("+experiment=demo"), {"synthetic": Samples(range(3))}) == []


def test_a_run_says_both_at_its_start(cli, tmp_path):
    arguments = ("+experiment=demo", "logger=csv", "trainer=cpu", "data.workers=0", "data.batch_size=2",
                 "data.test_length=3", "stage.group_size=2", "stage.micro_batch_size=2",
                 "rollout.max_tokens=8", "trainer.max_steps=1", "test_before=false")  # fmt: skip
    code, out, err = cli(*arguments, "+data.published={synthetic: 1000}")
    assert code == 0, err
    assert "1 rank x 2 = 2 samples per batch; the experiment has 16 (data.batch_size=16 keeps 16)" in out
    assert "synthetic: 1,000 samples are published, 3 were found" in out
    (run,) = (tmp_path / "runs/demo").iterdir()
    table = (run / "table.txt").read_text()
    assert "test/synthetic/sm" in table and all(line in out for line in table.splitlines())
