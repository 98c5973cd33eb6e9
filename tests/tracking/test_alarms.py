"""Alarms report what they name, once, and nothing else; the best checkpoint is the one that is scored."""

import json

import pytest
import torch

from segrl.runs.export import _scored
from segrl.stages.policy_gradient import PolicyGradientStage
from segrl.tracking.alarms import Alarms


def alarms(**bounds):
    return Alarms(3, {"rule": {"scalar": "x", "stop": False, **bounds}})


def rung(watch, name, values):
    return [watch.reasons({name: v}) for v in values]


@pytest.mark.parametrize(
    ("settings", "values", "rings_at"),
    [
        ({"above": 1.0}, [0.9, 1.0, 1.2, 1.3, 0.1], [2, 3]),
        ({"below": 0.5}, [0.6, 0.6, 0.6, 0.1, 0.1], [3, 4]),
        ({"collapse": 0.5}, [0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.5, 0.2, 0.1], [8]),
        ({"explosion": 2.0}, [1, 1, 1, 2, 2, 2, 3], [6]),
    ],
)
def test_a_mean_out_of_bounds_rings(settings, values, rings_at):
    watch = alarms(**settings)
    found = rung(watch, "x", values)
    assert [i for i, reasons in enumerate(found) if reasons] == rings_at


def test_an_alarm_goes_through_a_checkpoint():
    values = [1, 1, 1, 2, 2, 2]
    whole, half = alarms(explosion=1.9), alarms(explosion=1.9)
    rung(half, "x", values[:4])
    fresh = alarms(explosion=1.9)
    fresh.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert rung(whole, "x", values)[4:] == rung(fresh, "x", values[4:]) and rung(fresh, "x", [2])[0]


DEMO = (
    "+experiment=demo", "logger=csv", "data.workers=0", "data.batch_size=2", "data.test_length=4",
    "rollout.max_tokens=24", "stage.group_size=2", "trainer.accelerator=cpu",
)  # fmt: skip


def test_an_alarm_that_stops_saves_and_says_why(cli, tmp_path):
    code, out, err = cli(
        *DEMO, "trainer.max_steps=9", "callbacks.alarms.window=2",
        "+callbacks.alarms.rules.length={scalar: rollout/length, above: 1.0, stop: true}",
        f"paths.run={tmp_path}/run",
    )  # fmt: skip
    assert code == 0, err
    assert (
        "alarm at update 2: length (rollout/length" in out and "is above 1; the run is saved and stops" in out
    )
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 2


def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(cli, tmp_path, monkeypatch):
    tame = PolicyGradientStage.tame_gradients

    def spoilt(stage):
        norms = tame(stage)
        return {
            **norms,
            "policy/grad_norm": norms["policy/grad_norm"] * float("nan" if stage.global_step == 2 else 1),
        }

    monkeypatch.setattr(PolicyGradientStage, "tame_gradients", spoilt)
    code, out, err = cli(
        *DEMO, "trainer.max_steps=4", "callbacks.checkpoint.every_n_steps=2", f"paths.run={tmp_path}/run"
    )
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("segrl: ")]
    assert "policy/grad_norm" in line and "update 2" in line and "intact" in line
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_the_best_checkpoint_is_the_one_that_is_scored(cli, tmp_path, monkeypatch):
    """Validation scores the first of three updates best."""
    from segrl.stages.base import SegStage

    told = iter([0.9, 0.3, 0.2])

    def pretend(stage):
        stage.log("val/synthetic/sm", next(told))

    monkeypatch.setattr(SegStage, "on_validation_epoch_end", pretend)
    code, out, err = cli(
        *DEMO, "trainer.max_steps=3", "trainer.val_check_interval=1",
        "callbacks.best.monitor=val/synthetic/sm", "data.val_length=2", "stage.optimizer.lr=1e-2",
        f"paths.run={tmp_path}/run",
    )  # fmt: skip
    assert code == 0, err
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 1 and "at update 1" in out
    numbers = tmp_path / "run/metrics.json"
    said = json.loads(numbers.read_text())
    assert (said["steps"], said["scored_step"]) == (3, 1)
    assert _scored(tmp_path / "run", tmp_path / "run/checkpoints/best.ckpt")
    assert not _scored(tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt")
    numbers.write_text(json.dumps({**said, "scored_step": 3}))  # it was scored before a better one was kept
    assert not _scored(tmp_path / "run", tmp_path / "run/checkpoints/best.ckpt")
    del said["scored_step"]
    numbers.write_text(json.dumps(said))
    assert _scored(tmp_path / "run", tmp_path / "run/checkpoints/best.ckpt")
