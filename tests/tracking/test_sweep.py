"""A Hydra multirun is one MLflow parent with a child per job, and a table at the end."""

import pytest

MlflowClient = pytest.importorskip("mlflow.tracking").MlflowClient


def test_a_sweep_of_four_nano_jobs(cli, tmp_path):
    code, out, err = cli(
        "-m", "+experiment=demo", "stage.group_size=2,4", "seed=1,2", "trainer.max_steps=1", "data.batch_size=2", "data.workers=0",
        "data.test_length=4", "test_before=false", "rollout.max_tokens=24",
    )  # fmt: skip
    assert code == 0, err
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and len(runs) == 5
    assert {(c.data.params["stage/group_size"], c.data.params["seed"]) for c in children} == {
        (g, s) for g in "24" for s in "12"
    }
    assert all(r.info.status == "FINISHED" for r in runs)
    table = out.split("4 jobs by test/synthetic/sm")[1].strip().splitlines()
    objectives = [float(line.split()[0]) for line in table]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives == [
        round(v, 4) for v in sorted((c.data.metrics["objective"] for c in children), reverse=True)
    ]
    assert parent.data.metrics["objective"] == max(c.data.metrics["objective"] for c in children)
    assert "seed=" in parent.data.tags["best"]
