"""Recipes: runs that start from each other's checkpoints, done once, and one table."""

import pytest

from segrl import recipe
from segrl.front_door import conf_folder

RECIPES = sorted((conf_folder().parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_run_of_every_recipe_composes(path):
    from segrl.front_door import _composed, check_keys, register_resolvers

    register_resolvers()
    found = recipe.read(path)
    for job in found.jobs:
        line = recipe.command(found, job, job.seeds[0], path.parent / "nowhere")
        cfg = _composed("train", [x for x in line[3:]])
        check_keys(cfg)
        assert (cfg.init_from is None) == (job.start is None)


def test_the_papers_recipe_changes_no_value_of_the_paper():
    found = recipe.read(RECIPES[[p.stem for p in RECIPES].index("seg_r1_paper")])
    assert [j.experiment for j in found.jobs] == ["sft_fcot", "prerl_dis5k", "grpo_cod10k", "sod_duts"]
    assert not found.overrides and not any(j.overrides for j in found.jobs)


TINY = """
title: two runs
metric: iou
overrides: [logger=csv, data.workers=0, data.batch_size=2, data.test_length=3, rollout.max_tokens=16, stage.group_size=2, trainer.max_steps=1]
jobs:
  - {name: first, experiment: demo}
  - {name: second, experiment: demo, start: first, seeds: [1, 2]}
"""


def test_two_runs_and_their_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(
        "sys.argv",
        ["recipe", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs"), "--at-once", "2"],
    )
    recipe.main()
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
    recipe.main()  # nothing is done again
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("last.ckpt")} == written


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: x\nmetric: iou\njobs: [{name: a}]", ["jobs.0.experiment"]),
        ("title: x\nmetric: iou\njobs: [{name: a, experiment: demo, start: b}]", ["a.start", "got b"]),
        ("title: x\nmetric: iou\njobs: []\nother: 1", ["other"]),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_by_its_key(tmp_path, monkeypatch, capsys, text, words):
    (tmp_path / "r.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path / "r.yaml"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("segrl: ") and all(word in line for word in words)
