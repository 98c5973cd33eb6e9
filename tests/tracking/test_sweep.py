"""A Hydra multirun is one MLflow parent with a child per job, and ends with a table, even if jobs fail."""

import json

import pytest

from segrl.metrics.direction import LOWER_IS_BETTER, better, higher_is_better, worst
from segrl.metrics.referring import Referring
from segrl.metrics.saliency import METRICS, NAMES
from segrl.tracking.checkpoints import KeepBest
from segrl.tracking.sweep_parent import Row, SweepParent, _differs, ranked, table

MlflowClient = pytest.importorskip("mlflow.tracking").MlflowClient

SMALL = (
    "+experiment=demo", "trainer.max_steps=1", "data.batch_size=2", "data.workers=0", "data.test_length=4",
    "test_before=false", "rollout.max_tokens=24",
)  # fmt: skip


def test_a_sweep_of_four_nano_jobs_of_which_two_fail(cli, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    code, out, err = cli("-m", *SMALL, "stage.group_size=2,4", f"init_from=null,{tmp_path}/bad.ckpt")
    assert code == 1
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2 and len(runs) == 3 and all(r.info.status == "FINISHED" for r in runs)
    assert {c.info.run_name for c in children} == {
        "group_size=2 init_from=null", "group_size=4 init_from=null"
    }  # fmt: skip
    assert "job 1 of 4: group_size=2 init_from=null" in out
    assert err.count("init_from: must be a checkpoint") == 2 and "Traceback" not in err
    printed = out.split("4 jobs by test/synthetic/sm (more is better)")[1]
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")
    ]
    scored = [row for row in cells[2:] if row[2] != "failed"]
    objectives = [float(row[2]) for row in scored]
    assert objectives == sorted(objectives, reverse=True) and len(cells) == 6
    assert objectives == [
        round(v, 4) for v in sorted((c.data.metrics["objective"] for c in children), reverse=True)
    ]
    assert parent.data.metrics["objective"] == max(c.data.metrics["objective"] for c in children)
    assert parent.data.tags["best"] == scored[0][1]
    for row in scored:
        made = json.loads(
            (tmp_path / row[3].replace(str(tmp_path) + "/", "") / "provenance.json").read_text()
        )
        size = row[1].split()[0].partition("=")[2]
        assert f" stage.group_size={size} " in made["command"] and " -m " not in made["command"].removeprefix(
            "python -m "
        )
    (kept,) = (tmp_path / "runs" / "sweeps").glob("*/table.md")
    assert kept.read_text().strip() in out and "job 2 (group_size=2 init_from=" in kept.read_text()


def rows(*objectives):
    return [
        Row(job=i, differs=f"seed={i}", objective=value, failed="", folder="")
        for i, value in enumerate(objectives, 1)
    ]


@pytest.mark.parametrize(("metric", "order"), [("test/set/sm", [3, 1, 2]), ("test/set/mae", [1, 3, 2])])
def test_the_best_job_is_the_best_by_its_metric(metric, order):
    found = ranked(rows(0.1, None, 0.2), metric)
    assert [row.job for row in found] == order
    assert ("more" if metric.endswith("sm") else "less") + " is better" in table(found, metric)


def test_a_sweep_that_compares_nothing_says_what_it_could_compare(tmp_path):
    (tmp_path / "metrics.json").write_text(
        json.dumps({"metrics": {"test/set/iou": 0.5, "val/set/sm": 0.5, "test/set/sm": 0.5}})
    )
    one = Row(job=1, differs="seed=1", objective=None, failed="", folder=str(tmp_path))
    assert "objective_metric=test/set/sm compares them (or another of test/set/sm, test/set/iou)" in table(
        [one], None
    )


def test_two_sweeps_in_one_folder_have_rows_of_their_own(tmp_path, capsys):
    from hydra.core.utils import JobReturn, JobStatus
    from omegaconf import OmegaConf

    folder = tmp_path / "sweep"

    def configured(job):
        return OmegaConf.create({
            "logger": {}, "objective_metric": "test/set/sm", "paths": {"run": str(tmp_path / "run")},
            "hydra": {
                "overrides": {"task": ["seed=1,2"]}, "sweep": {"dir": str(folder)}, "job": {"num": job},
                "sweeper": {"_target_": "hydra._internal.BasicSweeper"},
            },
        })  # fmt: skip

    sweeps = SweepParent(), SweepParent()
    for sweep in sweeps:
        sweep.on_multirun_start(configured(0))
    for sweep, value in zip(sweeps, (0.25, 0.5), strict=True):
        ended = JobReturn(overrides=["seed=1"], status=JobStatus.COMPLETED)
        ended.return_value = value
        sweep.on_job_end(configured(0), ended)
    for sweep in sweeps:
        sweep.on_multirun_end(configured(0))
    out = capsys.readouterr().out
    assert out.count("1 jobs by test/set/sm") == 2
    assert "0.2500" in (folder / "table.md").read_text() and "0.5000" in (folder / "table-2.md").read_text()
    assert [len((folder / name).read_text().splitlines()) for name in ("jobs.jsonl", "jobs-2.jsonl")] == [
        1,
        1,
    ]


def test_jobs_are_named_by_what_differs():
    swept = ["stage.group_size", "seed", "a.lr", "b.lr"]
    said = ["+experiment=demo", "stage.group_size=4", "++seed=1", "a.lr=1", "b.lr=2", "trainer.max_steps=1"]
    assert _differs(said, swept) == "group_size=4 seed=1 a.lr=1 b.lr=2"


def test_each_metric_has_its_direction():
    referring = Referring("one", "exclude", True)
    names = {*NAMES, *METRICS, "fault_rate", "giou", "ciou", "n_acc", "t_acc", "p@.5"}
    assert referring.no_target and names >= LOWER_IS_BETTER
    assert {name for name in names if not higher_is_better(f"test/set/{name}")} == {
        "mae",
        "fault_rate",
        "hce",
    }
    for name in names:
        assert better(name, 0.5, worst(name)) and not better(name, float("nan"), 0.5)
    assert better("mae", 0.1, 0.2) and not better("sm", 0.1, 0.2)


class Trainer:
    """Stands for Lightning's trainer: has what `KeepBest` asks of it."""

    sanity_checking = False

    def __init__(self, monitor):
        self.monitor, self.saved, self.callback_metrics = monitor, [], {}

    def validated(self, watch, value):
        self.callback_metrics = {self.monitor: value}
        self.value = value
        watch.on_validation_end(self, None)

    def save_checkpoint(self, path):
        self.saved.append(self.value)


@pytest.mark.parametrize(
    ("metric", "kept"), [("mae", [0.3, 0.1]), ("fault_rate", [0.3, 0.1]), ("sm", [0.3, 0.4])]
)
def test_the_best_is_kept_by_the_direction_of_its_metric(tmp_path, metric, kept):
    trainer = Trainer(f"val/set/{metric}")
    watch = KeepBest(str(tmp_path / "best.ckpt"), trainer.monitor)
    watch.on_train_start(trainer, None)
    for value in (0.3, 0.4, 0.1):
        trainer.validated(watch, value)
    assert trainer.saved == kept
    again = KeepBest(str(tmp_path / "best.ckpt"), trainer.monitor)
    again.load_state_dict(watch.state_dict())
    trainer.validated(again, 0.35)
    assert trainer.saved == kept
    trainer.monitor = "val/other/iou"  # the best of another metric is still to come
    other = KeepBest(str(tmp_path / "best.ckpt"), trainer.monitor)
    other.load_state_dict(watch.state_dict())
    trainer.validated(other, 0.01)
    assert trainer.saved == [*kept, 0.01]
