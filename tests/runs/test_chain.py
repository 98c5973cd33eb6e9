"""Chains: runs that start from each other's checkpoints, each done once, and one table."""

import os
import signal
import subprocess
import sys
import time

import pytest

from segrl.chain import main
from segrl.runs import chain
from segrl.runs.configuration import conf_folder

CHAINS = sorted((conf_folder().parent / "chains").glob("*.yaml"))


@pytest.mark.parametrize("path", CHAINS, ids=lambda p: p.stem)
def test_every_run_of_every_chain_composes(path):
    from segrl.runs.configuration import check_keys, compose_job, register_resolvers

    register_resolvers()
    found = chain.read(path)
    for job in found.jobs:
        line = chain.command(found, job, job.seeds[0], path.parent / "nowhere")
        cfg = compose_job("train", [x for x in line[3:]])
        check_keys(cfg)
        assert (cfg.init_from is None) == (job.start is None)


PAPER = CHAINS[[p.stem for p in CHAINS].index("seg_r1_paper")]


def test_the_papers_chain_has_both_arms_and_changes_no_value_of_the_paper():
    found = chain.read(PAPER)
    assert [(j.name, j.experiment, j.start) for j in found.jobs] == [
        ("prerl", "prerl_dis5k", None),  # pure RL begins at the base model
        ("grpo", "grpo_cod10k", "prerl"),
        ("sod", "sod_duts", "grpo"),
        ("sft", "sft_fcot", None),
        ("grpo_from_sft", "grpo_cod10k", "sft"),
    ]
    placed = {"trainer", "policy.gradient_checkpointing", "data.batch_size"}  # where it runs, not what
    assert {o.partition("=")[0] for j in found.jobs for o in (*found.overrides, *j.overrides)} == placed


@pytest.mark.parametrize(
    ("more", "ranks"), [([], 8), (["trainer=default", "data.batch_size=${data.global_batch}"], 1)]
)
def test_the_papers_chain_learns_from_the_papers_batches(more, ranks):
    from segrl.runs.configuration import compose_job, register_resolvers
    from segrl.runs.departures import of_batch

    register_resolvers()
    found = chain.with_overrides(chain.read(PAPER), more)
    batches = {}
    for job in found.jobs:
        cfg = compose_job("train", chain.command(found, job, 42, PAPER.parent / "nowhere")[3:])
        assert of_batch(cfg, ranks) == [] and len(of_batch(cfg, ranks + 1)) == 1
        assert ("strategy" in cfg.trainer) == (ranks > 1)
        batches[job.name] = ranks * cfg.data.batch_size
    assert batches == {"prerl": 24, "grpo": 24, "sod": 24, "sft": 128, "grpo_from_sft": 24}


TINY = """
title: two runs
metric: iou
overrides: [logger=csv, data.workers=0, data.batch_size=2, data.test_length=3, rollout.max_tokens=16,
  stage.group_size=2, trainer.max_steps=1]
jobs:
  - {name: first, experiment: demo}
  - {name: second, experiment: demo, start: first, seeds: [1, 2]}
"""


def test_two_runs_and_their_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(
        "sys.argv",
        ["chain", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs"), "--at-once", "2"],
    )
    main()
    out = capsys.readouterr().out
    table = (tmp_path / "runs/table.md").read_text()
    assert table in out
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[:4] for row in rows[1:]] == [
        ["| first", "-", "1", "4"],
        ["| second", "first", "1", "4"],
        ["| second", "first", "2", "4"],
    ]
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("last.ckpt")}
    main()  # nothing is done again
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("last.ckpt")} == written


def test_overrides_of_the_command_line_follow_those_of_the_runs(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    found = chain.with_overrides(chain.read(tmp_path / "tiny.yaml"), ["trainer=ddp", "data.batch_size=4"])
    line = chain.command(found, found.jobs[0], 1, tmp_path / "runs")
    assert line.index("data.batch_size=4") > line.index("data.batch_size=2") and "trainer=ddp" in line
    assert line[-2:] == ["name=first", f"paths.run={tmp_path}/runs/first"]


@pytest.mark.parametrize(
    "wrong", ["trainer", "=3", "seed=3", "paths.run=x", "+experiment=demo", "init_from=a.ckpt"]
)
def test_overrides_that_a_chain_cannot_take_are_refused(tmp_path, monkeypatch, capsys, wrong):
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(
        "sys.argv",
        ["chain", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs"), "trainer=cpu", wrong],
    )
    with pytest.raises(SystemExit) as stop:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("segrl: chain: ") and line.endswith(f"got {wrong}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: x\nmetric: iou\njobs: [{name: a}]", ["jobs.0.experiment"]),
        ("title: x\nmetric: iou\njobs: [{name: a, experiment: demo, start: b}]", ["a.start", "got b"]),
        ("title: x\nmetric: iou\njobs: []\nother: 1", ["other"]),
        ("title: x\nmetric: nonsense\njobs: []", ["r.yaml: metric: ", "sm", "got nonsense"]),
        ("title: [x\nmetric: iou", ["r.yaml: must be YAML", "line 2"]),
        ("title: \0", ["r.yaml: must be YAML"]),
    ],
)
def test_a_chain_that_is_wrong_is_refused_by_its_key(tmp_path, monkeypatch, capsys, text, words):
    (tmp_path / "r.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["chain", str(tmp_path / "r.yaml"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("segrl: ") and all(word in line for word in words)


@pytest.mark.parametrize(
    "text",
    [
        '{"test": {"a": {"iou"',
        "[1]",
        '{"test": {}, "completions": 1}',
        '{"test": {"a": {}}, "completions": 1}',
        "\0\xff",
    ],
)
def test_a_run_whose_scores_are_damaged_is_named(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "r.yaml").write_text("title: x\nmetric: iou\njobs: [{name: a, experiment: demo}]\n")
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/metrics.json").write_text(text)  # finished, so that nothing is run
    monkeypatch.setattr("sys.argv", ["chain", str(tmp_path / "r.yaml"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as stop:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(
        f"segrl: chain: {tmp_path}/runs/a/metrics.json must hold"
    ), line
    assert not (tmp_path / "runs/table.md").exists()


def test_a_chain_that_is_stopped_lets_its_runs_save(tmp_path, monkeypatch, capsys):
    saving = (
        "import pathlib, signal, sys, time\n"
        "begun, saved = (pathlib.Path(sys.argv[1], name) for name in ('begun', 'saved'))\n"
        "signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), sys.exit(143)))\n"
        "begun.touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(chain, "command", lambda *_: [sys.executable, "-c", saving, str(tmp_path)])
    sleep = time.sleep

    def asked(seconds):
        if (tmp_path / "begun").exists():
            os.kill(os.getpid(), signal.SIGINT)
        sleep(seconds)

    monkeypatch.setattr(chain.time, "sleep", asked)
    (tmp_path / "chain.yaml").write_text(TINY)
    monkeypatch.setattr(
        sys, "argv", ["chain", str(tmp_path / "chain.yaml"), "--runs", str(tmp_path / "runs")]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert (tmp_path / "saved").exists()
    assert "stopped by SIGINT: the same command continues each run" in capsys.readouterr().out


def test_a_run_that_was_begun_goes_on_and_one_that_another_process_begins_is_left_alone(tmp_path):
    (tmp_path / "chain.yaml").write_text(TINY)
    found = chain.read(tmp_path / "chain.yaml")
    first = tmp_path / "first"
    (first / "evaluation").mkdir(parents=True)
    (first / "config.yaml").write_text("name: first\n")
    assert chain.command(found, found.jobs[0], 1, tmp_path)[-1] == f"resume={first}"
    (first / "config.yaml").unlink()
    holding = (
        "import sys, time; from segrl.host.files import own; "
        "own(__import__('pathlib').Path(sys.argv[1]), 'x'); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holding, str(first)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="is used by another process"):
            chain.command(found, found.jobs[0], 1, tmp_path)
        assert first.is_dir()
        other.kill()
    assert chain.command(found, found.jobs[0], 1, tmp_path)[3] == "+experiment=demo"
    assert not first.exists()


THREE = "title: x\nmetric: iou\njobs:\n" + "".join(
    f"  - {{name: {name}, experiment: demo{start}}}\n"
    for name, start in (("slow", ""), ("after", ", start: slow"), ("other", ""))
)


def scripted(monkeypatch, tmp_path, scripts):
    """Replace the command of each run by a Python script, which finds the chain's folder in argv[1]."""

    def command(_, job, seed, runs):
        folder = chain.folder_of(runs, job, seed)
        folder.mkdir(parents=True, exist_ok=True)
        return [sys.executable, "-c", scripts[job.name], str(tmp_path)]

    monkeypatch.setattr(chain, "command", command)
    (tmp_path / "chain.yaml").write_text(THREE)
    return chain.read(tmp_path / "chain.yaml")


def test_a_run_that_waits_holds_up_none_behind_it(tmp_path, monkeypatch):
    done = "import pathlib, sys; pathlib.Path(sys.argv[1], 'NAME', 'metrics.json').write_text('{}')"
    wait = (
        "import pathlib, sys, time\n"
        "until = time.monotonic() + 60\n"
        "while not pathlib.Path(sys.argv[1], 'other', 'metrics.json').exists():\n"
        "    assert time.monotonic() < until, 'the run behind the waiting one was never started'\n"
        "    time.sleep(0.1)\n"
    ) + done.replace("NAME", "slow")
    scripts = {"slow": wait, "after": done.replace("NAME", "after"), "other": done.replace("NAME", "other")}
    chain.run_all(scripted(monkeypatch, tmp_path, scripts), tmp_path, at_once=2)
    assert all((tmp_path / name / "metrics.json").exists() for name in scripts)


def test_a_run_that_fails_ends_the_chain_once_the_others_have_saved(tmp_path, monkeypatch):
    saves = (
        "import pathlib, signal, sys, time\n"
        "begun, saved = (pathlib.Path(sys.argv[1], name) for name in ('begun', 'saved'))\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), saved.touch(), sys.exit(143)))\n"
        "begun.touch()\n"
        "time.sleep(60)\n"
    )
    fails = (
        "import pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[1], 'begun').exists(): time.sleep(0.1)\n"
        "sys.exit(3)\n"
    )
    scripts = {"slow": saves, "after": "", "other": fails}
    with pytest.raises(ValueError, match=r"chain: the run other, seed 1, .*3"):
        chain.run_all(scripted(monkeypatch, tmp_path, scripts), tmp_path, at_once=2)
    assert (tmp_path / "saved").exists()
