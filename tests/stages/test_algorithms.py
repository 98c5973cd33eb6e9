"""Every algorithm on the one loop: it runs, starts at ratio 1, resumes, and does what is special to it."""

import json

import pytest
import torch
import yaml

from segrl.runs.configuration import conf_folder
from segrl.stages.policy_gradient import PolicyGradientStage
from segrl.stages.ppo import PPOStage

RUN = (
    "+experiment=demo", "logger=csv", "data.workers=0", "data.batch_size=4", "data.test_length=2",
    "data.train_length=16", "rollout.max_tokens=24", "stage.group_size=3", "trainer.accelerator=cpu",
    "trainer.max_steps=4", "stage.micro_batch_size=2", "stage.optimizer.lr=1e-3", "policy.temperature=1.0",
    "stage.schedule=null",
)  # fmt: skip
REFERENCE = ("reference=frozen_copy", "stage.kl_weight=0.01")
# Names of logged scalars are API: a rename breaks dashboards and sweeps, and is a line in CHANGELOG.md.
LOGGED = {
    "step", "reward/total", "reward/iou", "reward/structure", "reward/format", "reward/spread",
    "rollout/length", "rollout/fault_rate", "rollout/cut_off", "rollout/repeated", "rollout/dead_groups",
    "policy/loss", "policy/ratio", "policy/clip_low", "policy/clip_high", "policy/entropy", "policy/drift",
    "policy/kl", "policy/grad_norm",
}  # fmt: skip
BY_A_CRITIC = {
    "critic/explained_variance", "critic/value", "critic/value_loss", "critic/value_clip", "critic/grad_norm",
}  # fmt: skip
OWN = {"dapo": ("stage.live_samples=2",), "rloo": ("stage.kl_weight=0.0", "stage.kl_reward=0.05")}
STAGES = sorted(
    p.stem
    for p in (conf_folder() / "stage").glob("*.yaml")
    if p.stem[0] != "_" and p.stem not in ("sft", "sft_traces", "tower", "mask_head")
)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("stage", STAGES)
def test_every_algorithm_starts_at_ratio_one_and_moves_the_policy(cli, tmp_path, monkeypatch, stage):
    seen = []
    update = PolicyGradientStage.update

    def watched(self, minibatch):
        stats = update(self, minibatch)
        seen.append({name: float(value) for name, value in stats.items()})
        return stats

    monkeypatch.setattr(PolicyGradientStage, "update", watched)
    warm = ("stage.critic_warmup=0",) if stage.startswith("ppo") else ()
    code, _, err = cli(
        *RUN, f"stage={stage}", *REFERENCE, *OWN.get(stage, ()), *warm, f"paths.run={tmp_path}/run"
    )
    assert code == 0, err
    assert seen[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert seen[0]["policy/clip_low"] == seen[0]["policy/clip_high"] == 0
    assert seen[0]["policy/drift"] == pytest.approx(0.0, abs=1e-6)
    assert all(torch.isfinite(torch.tensor(list(stats.values()))).all() for stats in seen)
    assert seen[0]["policy/grad_norm"] > 0
    updates = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["stage"]["updates_per_rollout"]
    drifts = [abs(stats["policy/drift"]) > 1e-6 for stats in seen]
    assert not any(drifts[::updates])  # the first minibatch is the policy's own, the others no longer
    assert updates == 1 or any(drifts)
    lines = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert len(lines) == 4 // updates
    assert {name for line in lines for name in line} == LOGGED | (BY_A_CRITIC if warm else set())


def test_the_warm_up_moves_the_critic_alone(cli, tmp_path):
    code, _, err = cli(*RUN, "stage=ppo", *REFERENCE, "stage.critic_lr=1e-3", f"paths.run={tmp_path}/warm")
    assert code == 0, err
    code, _, err = cli(*RUN, "stage=ppo", *REFERENCE, "stage.critic_warmup=1", f"paths.run={tmp_path}/later")
    assert code == 0, err
    warm, later = weights(tmp_path / "warm")["state_dict"], weights(tmp_path / "later")["state_dict"]
    assert not torch.equal(
        warm["critic.head.outer.weight"], torch.zeros_like(warm["critic.head.outer.weight"])
    )
    from segrl.models.hf_vlm import HFPolicy
    from segrl.runs.configuration import asset

    start = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False).state_dict()
    assert all(torch.equal(warm[f"policy.{name}"], value) for name, value in start.items())
    assert any(not torch.equal(later[f"policy.{name}"], value) for name, value in start.items())


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("stage", ["ppo_dense", "sam_r1"])
def test_resume_is_exact_with_a_critic_two_updates_and_a_reward_that_remembers(
    cli, tmp_path, monkeypatch, stage
):
    arguments = (
        *RUN,
        f"stage={stage}",
        *REFERENCE,
        "reward=quantile",
        "trainer.max_steps=8",
        "callbacks.checkpoint.every_n_steps=2",
    )
    arguments += ("stage.critic_warmup=3",) if stage.startswith("ppo") else ()
    schedule = (
        "stage.schedule={_target_: segrl.stages.schedule.one_cycle, _partial_: true, "
        "pct_start: 0.3, cycle_momentum: false}"
    )
    arguments = (*arguments, schedule)
    code, _, err = cli(*arguments, f"paths.run={tmp_path}/whole")
    assert code == 0, err
    update = PolicyGradientStage.update

    def dying(self, minibatch):
        if self.global_step == 5:  # in the middle of a rollout
            raise Killed
        return update(self, minibatch)

    monkeypatch.setattr(PolicyGradientStage, "update", dying)
    with pytest.raises(Killed):
        cli(*arguments, f"paths.run={tmp_path}/cut")
    monkeypatch.setattr(PolicyGradientStage, "update", update)
    code, _, err = cli(f"resume={tmp_path}/cut", runs=None)
    assert code == 0, err
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole["global_step"] == cut["global_step"] == 8
    assert whole["reward"] == cut["reward"] and whole["sampled"] == cut["sampled"]
    assert all(torch.equal(value, cut["state_dict"][name]) for name, value in whole["state_dict"].items())
    histories = [(tmp_path / run / "history.jsonl").read_text() for run in ("whole", "cut")]
    assert histories[0] == histories[1]


def test_dapo_keeps_groups_with_spread_and_stops_sampling_when_it_has_enough(cli, tmp_path, monkeypatch):
    """Samples at even places of the batch have groups without spread."""
    from segrl.rewards.mixture import RewardMixture

    score, tried = RewardMixture.__call__, []

    def uneven(self, answers, samples):
        scores = score(self, answers, samples)
        for b, sample in enumerate(samples):
            place = int(sample.id[-6:]) % 2
            scores.total[b] = torch.arange(scores.total.shape[1]).float() if place else 0.5
            tried.append(sample.id)
        return scores

    monkeypatch.setattr(RewardMixture, "__call__", uneven)
    code, _, err = cli(
        *RUN, "stage=dapo", "stage.live_samples=2", "data.batch_size=12", "trainer.max_steps=2",
        "test_before=false", f"paths.run={tmp_path}/run",
    )  # fmt: skip
    assert code == 0, err
    assert 2 <= len(tried) < 12 and len(tried) % 2 == 0
    line = json.loads((tmp_path / "run/history.jsonl").read_text())
    assert line["rollout/dead_groups"] == 0.0
    odd = [int(name[-6:]) % 2 for name in tried]
    assert sum(odd) >= 2 and sum(odd[:-2]) < 2


def test_the_critic_reads_the_ground_truth_and_the_policy_does_not(cli, tmp_path, monkeypatch):
    told = []
    privileged = PPOStage.privileged
    monkeypatch.setattr(
        PPOStage, "privileged", lambda self, batch: told.append(privileged(self, batch)) or told[-1]
    )
    code, _, err = cli(*RUN, "stage=ppo", *REFERENCE, "stage.critic.insight=5", f"paths.run={tmp_path}/run")
    assert code == 0, err
    assert told[0].shape == (12, 5) and ((told[0] >= 0) & (told[0] <= 1)).all()
    assert (told[0][:3] == told[0][0]).all() and not torch.equal(told[0][0], told[0][3])


def test_under_a_schedule_the_critic_peaks_at_its_own_rate(cli, tmp_path, monkeypatch):
    rates = []
    update = PolicyGradientStage.update

    def watched(self, minibatch):
        rates.append([group["lr"] for group in self.optimizers().param_groups])
        return update(self, minibatch)

    monkeypatch.setattr(PolicyGradientStage, "update", watched)
    one_cycle = (
        "stage.schedule={_target_: segrl.stages.schedule.one_cycle, _partial_: true, "
        "pct_start: 0.5, cycle_momentum: false}"
    )
    ppo = (*RUN[:-1], "stage=ppo", *REFERENCE, "stage.critic_lr=1e-2", "trainer.max_steps=8", one_cycle)
    code, _, err = cli(*ppo, f"paths.run={tmp_path}/run")
    assert code == 0, err
    policy, critic = zip(*rates, strict=True)
    assert max(policy) == pytest.approx(1e-3)
    assert max(critic) == pytest.approx(1e-2)


def test_a_schedule_that_puts_one_peak_on_all_groups_is_refused(cli, tmp_path):
    one_peak = "stage.schedule={_target_: torch.optim.lr_scheduler.OneCycleLR, _partial_: true, max_lr: 1e-3}"
    code, _, err = cli(
        *RUN[:-1], "~stage.schedule", "stage=ppo", *REFERENCE, "stage.critic_lr=1e-2", f"+{one_peak}"
    )
    assert code == 2
    assert "stage.schedule: must peak at stage.optimizer.lr" in err and "0.01" in err
