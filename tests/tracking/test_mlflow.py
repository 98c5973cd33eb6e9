"""An MLflow database that is locked, gone, outdated, or without the run stops no run that can go on."""

import json
import shutil
import sqlite3
from contextlib import closing, suppress

import pytest
import sqlalchemy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from segrl.stages.base import Stage
from segrl.tracking import mlflow_store
from segrl.tracking.mlflow_logger import MlflowRun
from segrl.tracking.mlflow_runs import bring_in, open_logger
from segrl.tracking.mlflow_store import CannotTrackError, Place, Run

MlflowClient = pytest.importorskip("mlflow.tracking").MlflowClient

SMALL = (
    "+experiment=demo", "trainer.max_steps=2", "data.batch_size=2", "data.workers=0", "data.test_length=2",
    "test_before=false", "rollout.max_tokens=24", "stage.group_size=2", "trainer.accelerator=cpu",
)  # fmt: skip


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Return a database that MLflow has made, without experiments; making one takes seconds."""
    file = tmp_path_factory.mktemp("mlflow") / "fresh.db"
    Place(tracking_uri=f"sqlite:///{file}", artifacts=str(file.parent), experiment="any").connect()
    return file


@pytest.fixture
def place(fresh, tmp_path):
    """Of a test's own."""
    (tmp_path / "runs").mkdir()
    shutil.copy(fresh, tmp_path / "runs" / "mlflow.db")
    runs = tmp_path / "runs"
    return Place(
        tracking_uri=f"sqlite:///{runs}/mlflow.db",
        artifacts=str(runs / "mlflow-artifacts"),
        experiment="demo",
    )


@pytest.fixture
def empty(tmp_path):
    """Return the folder of a run that begins."""
    made = tmp_path / "runs" / "one"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def folder(empty):
    """Return a run folder in which two updates have left their scalars."""
    for step in (1, 2):
        updated(empty, step)
    return empty


def updated(folder, step):
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward/total": 0.1}) + "\n")


def only_run(place):
    found = MlflowClient(place.url)
    (run,) = found.search_runs([found.get_experiment_by_name(place.experiment).experiment_id])
    return run


def steps(place, metric="reward/total"):
    run = only_run(place).info.run_id
    return [point.step for point in MlflowClient(place.url).get_metric_history(run, metric)]


def logger_of(place, folder, checkpoints=False):
    return MlflowRun(place, folder, {"command": "python -m segrl.train"}, folder.name, checkpoints)


def two_updates(logger, between):
    """Log what a run of two updates logs; call `between` after the first."""
    logger.log_hyperparams({"stage": {"group_size": 2}, "seed": 1})
    for step in (1, 2):
        updated(logger.folder, step)
        logger.log_metrics({"reward/total": 0.1}, step)
        if step == 1:
            between()


def said_once(out, folder):
    (line,) = [line for line in out.splitlines() if "; scalars are written to " in line]
    assert (
        line.startswith("MLflow: ")
        and f"add them to MLflow later with: python -m segrl.track {folder}" in line
    )
    return line


def deleted(place):
    MlflowClient(place.url).delete_run(only_run(place).info.run_id)


def of_another_schema(place):
    with closing(sqlite3.connect(place.database)) as held, held:
        held.execute("DROP TABLE metrics")
        held.execute("UPDATE alembic_version SET version_num = 'of_tomorrow'")


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda place: place.database.unlink(), "no such table"),
        (lambda place: place.database.write_text("far from being a database" * 99), "not a database"),
        (of_another_schema, "no such table"),
        (deleted, "deleted"),
    ],
    ids=["gone", "overwritten", "of another schema", "run deleted"],
)
def test_what_fails_on_the_way_is_said_once_and_stops_nothing(place, empty, capsys, spoil, word):
    logger = logger_of(place, empty)
    two_updates(logger, lambda: spoil(place))
    logger.conclude([], {"objective": 0.5})
    assert word in said_once(capsys.readouterr().out, empty) and logger.off


def test_a_lock_that_is_let_go_of_loses_nothing(place, empty, capsys, monkeypatch):
    held = sqlite3.connect(place.database, isolation_level=None)
    logger = logger_of(place, empty)
    two_updates(logger, lambda: held.execute("BEGIN EXCLUSIVE"))
    held.close()
    assert steps(place) == [1]
    logger.conclude([], {"objective": 0.5})
    out = capsys.readouterr().out
    assert "locked" in said_once(out, empty) and "it responds again" in out
    assert steps(place) == [1, 2] and only_run(place).info.status == "FINISHED"


def test_a_configuration_that_was_refused_is_brought_in_at_the_end(place, empty, capsys):
    held = sqlite3.connect(place.database, isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    logger = logger_of(place, empty)
    two_updates(logger, held.close)
    logger.conclude([], {"objective": 0.5})
    assert "the configuration and all scalars were added" in capsys.readouterr().out
    assert steps(place) == [1, 2] and only_run(place).data.params == {"stage/group_size": "2", "seed": "1"}


def test_a_full_disk_under_the_database_stops_nothing(place, empty, capsys):
    def full():
        """sqlite says so beyond a number of pages, which is a connection's own."""
        engine = logger.run.client._tracking_client.store.engine
        sqlalchemy.event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA max_page_count = 1"))
        logger.log_metrics({f"much/{i}": 1.0 for i in range(900)}, 1)

    logger = logger_of(place, empty)
    two_updates(logger, full)
    assert "full" in said_once(capsys.readouterr().out, empty)


def test_what_is_missing_is_brought_in_once(place, folder):
    (folder / "metrics.json").write_text(
        json.dumps({"steps": 2, "objective": 0.5, "metrics": {"test/set/sm": 0.5}})
    )
    (folder / "provenance.json").write_text(json.dumps({"command": "python -m segrl.train"}))
    (folder / "validation.jsonl").write_text(json.dumps({"step": 2, "val/set/mae": 0.1}) + "\n")
    (folder / "checkpoints").mkdir()
    _, first = bring_in(folder, place, {"stage": {"group_size": 2}}, checkpoints=False)
    _, second = bring_in(folder, place, {"stage": {"group_size": 2}}, checkpoints=False)
    assert (first, second) == (5, 0)
    run = only_run(place)
    assert steps(place) == [1, 2] and steps(place, "val/set/mae") == [2] and steps(place, "objective") == [2]
    assert run.info.status == "FINISHED" and run.data.params == {"stage/group_size": "2"}
    assert run.data.tags["command"] == "python -m segrl.train"
    assert run.data.tags["checkpoints"] == str(folder / "checkpoints")
    kept = {one.path for one in MlflowClient(place.url).list_artifacts(run.info.run_id)}
    assert kept == {"history.jsonl", "validation.jsonl", "metrics.json", "provenance.json"}


def test_a_deleted_run_that_is_brought_in_comes_back(place, folder, capsys):
    bring_in(folder, place, {}, checkpoints=False)
    deleted(place)
    bring_in(folder, place, {}, checkpoints=False)
    assert "restored the deleted run" in capsys.readouterr().out and steps(place) == [1, 2]


def test_the_scores_of_an_evaluation_are_brought_in(place, folder):
    scored = {"datasets": {"camo": {"fault_rate": 0.25, "scores": {"sm": {"value": 0.5, "interval": None}}}}}
    (folder / "metrics.json").write_text(json.dumps(scored))
    bring_in(folder, place, {}, checkpoints=False)
    found = only_run(place).data.metrics
    assert found["test/camo/sm"] == 0.5 and found["test/camo/fault_rate"] == 0.25


def test_a_damaged_file_is_named(place, folder):
    (folder / "metrics.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"metrics\.json: must be JSON"):
        bring_in(folder, place, {}, checkpoints=False)


def test_validation_is_kept_in_the_folder(place, folder):
    logger = logger_of(place, folder)
    logger.log_hyperparams({"seed": 1})
    logger.log_metrics({"val/set/mae": 0.25, "epoch": 0}, 2)
    assert json.loads((folder / "validation.jsonl").read_text()) == {"step": 2, "val/set/mae": 0.25}
    assert steps(place, "val/set/mae") == [2]


@pytest.mark.parametrize("how", ["of another schema", "a folder", "no database", "locked"])
def test_what_cannot_begin_is_refused_before_anything_is_made(place, tmp_path, how, monkeypatch):
    monkeypatch.setattr(mlflow_store, "_SECONDS", 0.1)
    file = place.database
    held = sqlite3.connect(file, isolation_level=None)
    if how == "of another schema":
        held.execute("UPDATE alembic_version SET version_num = 'of_tomorrow'")
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how == "no database":
        file.write_text("far from being a database" * 99)
    elif how == "locked":
        held.execute("BEGIN EXCLUSIVE")
    new = tmp_path / "runs" / "new"
    with pytest.raises(CannotTrackError) as refused:
        open_logger(
            new,
            {},
            tracking_uri=place.tracking_uri,
            artifacts=place.artifacts,
            experiment="demo",
            checkpoints=False,
        )
    held.close()
    line = str(refused.value)
    assert line.startswith("logger.tracking_uri: ") and str(file) in line and "logger=csv" in line
    assert "\n" not in line and not new.exists()


def test_a_run_that_goes_on_does_so_without_its_database(place, folder, capsys):
    place.database.write_text("far from being a database" * 99)
    logger = open_logger(
        folder,
        {},
        tracking_uri=place.tracking_uri,
        artifacts=place.artifacts,
        experiment="demo",
        checkpoints=False,
    )
    logger.log_metrics({"reward/total": 0.3}, 3)
    said_once(capsys.readouterr().out, folder)


@pytest.mark.parametrize("held", [b"", b"0123456789abcdef0123456789abcdef", b"\xff\x00 no id"])
def test_a_folder_that_names_no_run_of_the_database_gets_a_new_one_with_all_it_has(
    place, folder, capsys, held
):
    (folder / "mlflow_run_id").write_bytes(held)
    logger = logger_of(place, folder)
    logger.log_hyperparams({"seed": 1})
    assert "created a new run" in capsys.readouterr().out
    run = only_run(place)
    assert (folder / "mlflow_run_id").read_text() == run.info.run_id and run.data.params["seed"] == "1"
    assert steps(place) == [1, 2]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("broken"), "FAILED"), (SIGTERMException(), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_how_a_run_ended_and_that_it_goes_on(place, folder, error, status):
    logger = logger_of(place, folder)
    logger.log_metrics({"reward/total": 0.1}, 1)
    assert only_run(place).info.status == "RUNNING"
    logger.finalize("success")  # Lightning says so after a test, too
    assert only_run(place).info.status == "RUNNING"
    with suppress(type(error)):
        try:
            raise error
        except BaseException:
            logger.finalize("failed")
            raise
    assert only_run(place).info.status == status
    again = logger_of(place, folder)
    again.log_metrics({"reward/total": 0.2}, 2)
    assert only_run(place).info.status == "RUNNING"
    again.conclude([], {})
    assert only_run(place).info.status == "FINISHED"


def test_a_deleted_experiment_is_restored(place, capsys):
    found, experiment = place.connect()
    found.delete_experiment(experiment)
    assert place.connect()[1] == experiment
    assert "restored the deleted experiment demo" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sp ace", "per%20cent", "q?mark", "é中", "ha#sh", "eq=ual"])
def test_any_path_is_a_database(fresh, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(fresh, folder / "mlflow.db")
    place = Place(
        tracking_uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "art"), experiment="demo"
    )
    (folder / "a.txt").write_text("x")
    run = Run.begin(place, folder, {}, None, "one")
    run.attach([folder / "a.txt"], checkpoints=False)
    assert [p.name for p in (folder / "art").rglob("*.txt")] == ["a.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    place = Place(
        tracking_uri=f"sqlite:///{tmp_path}/file/runs/mlflow.db", artifacts=str(tmp_path), experiment="demo"
    )
    with pytest.raises(CannotTrackError, match=r"^paths\.runs: "):
        place.connect()


def test_a_folder_that_is_no_run_is_not_brought_in(cli, tmp_path):
    code, _, err = cli(str(tmp_path), module="track", runs=None)
    assert code == 2 and err.startswith("segrl: RUN: ") and "config.yaml" in err


def test_a_whole_run_is_tracked_and_its_checkpoint_is_not_copied(cli, place, tmp_path):
    folder = tmp_path / "runs" / "whole"
    code, out, err = cli(*SMALL, f"paths.run={folder}")
    assert code == 0, err
    run = only_run(place)
    history = [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines()]
    assert run.info.status == "FINISHED" and steps(place) == history == [1, 2]
    assert (
        f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning" in out
    )
    assert run.data.tags["checkpoints"] == str(folder / "checkpoints")
    assert run.data.metrics["run/learning_rate"] > 0 and steps(place, "run/seconds") == [2]
    kept = {one.path for one in MlflowClient(place.url).list_artifacts(run.info.run_id)}
    assert {"history.jsonl", "metrics.json", "evaluation"} <= kept and "checkpoints" not in kept


def test_a_whole_run_ends_well_without_its_database_and_is_brought_in_later(
    cli, place, tmp_path, monkeypatch
):
    folder, remember = tmp_path / "runs" / "whole", Stage.remember

    def spoilt(stage, scalars):
        if (folder / "history.jsonl").read_text():
            place.database.unlink(missing_ok=True)
        remember(stage, scalars)

    monkeypatch.setattr(Stage, "remember", spoilt)
    code, out, err = cli(*SMALL, f"paths.run={folder}", "logger.checkpoints=true")
    assert code == 0, err
    said_once(out, folder)
    assert f"MLflow lacks a part of this run; add it with: python -m segrl.track {folder}" in out
    other = Place(tracking_uri=f"sqlite:///{tmp_path}/other.db", artifacts=place.artifacts, experiment="demo")
    code, out, err = cli(
        str(folder), "--tracking-uri", other.tracking_uri, "--checkpoints", module="track", runs=None
    )
    assert code == 0, err
    run = only_run(other)
    assert steps(other) == [1, 2] and run.data.params["stage/group_size"] == "2"
    assert run.data.metrics["objective"] == json.loads((folder / "metrics.json").read_text())["objective"]
    (copied,) = MlflowClient(other.url).list_artifacts(run.info.run_id, "checkpoints")
    assert copied.path == "checkpoints/last.ckpt"
