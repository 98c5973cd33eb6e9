"""GRPO learns: the reward of its samples and the score of its greedy answers on held-out scenes rise."""

import json

import numpy as np
import pytest


@pytest.mark.slow
def test_a_short_demo_learns(cli, tmp_path):
    code, out, err = cli("+experiment=demo", "trainer.max_steps=80", "logger=csv", "data.test_length=256")
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "demo").iterdir()
    rewards = [json.loads(line)["reward/total"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert np.mean(rewards[-15:]) > np.mean(rewards[:15]) + 0.05
    table = json.loads((run / "metrics.json").read_text())["test"]["synthetic"]
    for metric in ("iou", "structure"):
        assert table[metric]["interval"][0] > 0, table


@pytest.mark.slow
def test_nothing_is_learned_from_a_reward_without_signal(cli, tmp_path):
    """Negative control: the same run at a learning rate of nothing gains nothing."""
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
