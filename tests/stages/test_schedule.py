"""The learning rate over runs of any length."""

import pytest
import torch

from segrl.stages.schedule import one_cycle


@pytest.mark.parametrize("updates", [1, 2, 3, 10, 20, 400])
def test_one_cycle_is_laid_over_a_run_of_any_length(updates):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = one_cycle(optimizer, total_steps=updates, pct_start=0.05, cycle_momentum=False)
    rates = []
    for _ in range(updates):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()  # behind the last update, too, as a stage does
    assert rates[0] == pytest.approx(1 / 25)
    if updates > 3:
        assert max(rates) == pytest.approx(1.0, abs=0.05) and rates[-1] < rates[0] / 100


def test_a_long_run_has_the_rates_of_torch():
    def rates(make, **peak):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make(optimizer, total_steps=400, pct_start=0.05, cycle_momentum=False, **peak)
        seen = []
        for _ in range(399):
            seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return seen

    assert rates(one_cycle) == rates(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0)


def test_every_group_peaks_at_its_own_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 1e-3}], lr=1.5e-4
    )
    schedule = one_cycle(optimizer, total_steps=40, pct_start=0.25, cycle_momentum=False)
    seen = []
    for _ in range(39):
        seen.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    assert max(policy for policy, _ in seen) == pytest.approx(1.5e-4)
    assert max(critic for _, critic in seen) == pytest.approx(1e-3)


def test_a_schedule_that_the_run_is_too_short_for_is_refused_in_one_line(cli):
    torchs = "_target_: torch.optim.lr_scheduler.OneCycleLR, _partial_: true"
    schedule = f"{{{torchs}, max_lr: 1.5e-4, pct_start: 0.05, cycle_momentum: false}}"
    code, _, error = cli(
        "+experiment=demo", "logger=csv", "data.workers=0", "data.test_length=2", "data.train_length=16",
        "trainer.accelerator=cpu", "trainer.max_steps=20", "~stage.schedule", f"+stage.schedule={schedule}",
    )  # fmt: skip
    assert code == 2
    assert "stage.schedule: must fit the run's 20 updates" in error
    assert "Traceback" not in error
