"""GRPO learns: the reward of its samples and the score of its greedy answers on held-out scenes rise."""

import json

import numpy as np
import pytest


@pytest.mark.slow
def test_the_demo_learns(cli, tmp_path):
    """The whole demo, as `make demo` runs it: both scores rise by at least 0.05, on boxes that differ by
    scene.
    """
    code, out, err = cli("+experiment=demo", "logger=csv")
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "demo").iterdir()
    rewards = [json.loads(line)["reward/iou"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert np.mean(rewards[-50:]) > np.mean(rewards[:50]) + 0.1
    table = json.loads((run / "metrics.json").read_text())["test"]["synthetic"]
    for metric in ("iou", "sm"):
        assert table[metric]["gain"] >= 0.05 and table[metric]["interval"][0] > 0, table
        assert table[metric]["n"] >= 256
    answers = [json.loads(line) for line in (run / "evaluation" / "after.jsonl").read_text().splitlines()]
    assert (
        len({str(answer["boxes"]) for answer in answers}) > 100
    )  # one box for all would be a trick on the mask head


@pytest.mark.slow
def test_nothing_is_learned_from_a_reward_without_signal(cli, tmp_path):
    """Negative control: the same run at a learning rate of zero gains nothing."""
    code, out, err = cli(
        "+experiment=demo",
        "trainer.max_steps=3",
        "logger=csv",
        "data.test_length=64",
        "stage.optimizer.lr=1e-30",
    )
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "demo").iterdir()
    table = json.loads((run / "metrics.json").read_text())["test"]["synthetic"]
    assert all(row["gain"] == 0 for row in table.values())
