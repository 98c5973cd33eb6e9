"""Before and after: the table, its intervals over images, and why a test set may not have moved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from segrl.metrics.functional.bootstrap import paired_bootstrap
from segrl.runs import records, report


def line(i: int, iou: float, text: str = "same", cluster: str | None = None, dataset: str = "set") -> dict:
    """Return what is kept of one evaluated sample."""
    own = {} if cluster is None else {"cluster": cluster}
    return {
        "dataset": dataset,
        "id": f"s{i}",
        **own,
        "scores": {"iou": iou, "sm": iou, "mae": 1 - iou},
        "fault": None,
        "text": text,
    }


def run_of(folder: Path, before: list[dict], after: list[dict]) -> Path:
    """Return a run folder with both evaluations."""
    (folder / "evaluation").mkdir(parents=True)
    for name, lines in (("before", before), ("after", after)):
        (folder / "evaluation" / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_sentences_of_an_image_are_drawn_together_and_the_table_says_so(tmp_path, capsys):
    old, new = np.random.default_rng(1).random((2, 20))
    alone = run_of(
        tmp_path / "alone", [line(i, old[i]) for i in range(20)], [line(i, new[i]) for i in range(20)]
    )

    def thrice(values):
        return [line(i, values[i % 20], cluster=f"image {i % 20}") for i in range(60)]

    repeated = run_of(tmp_path / "repeated", thrice(old), thrice(new))
    one = report.conclude(alone, 3, 5, 1e-6, [])["set"]["iou"]
    assert one.interval == paired_bootstrap(old, new, 3), "a sample an image: the digits of no clusters"
    assert (one.n, one.images) == (20, 20) and "set, 20 held-out images\n" in capsys.readouterr().out
    many = report.conclude(repeated, 3, 5, 1e-6, [])["set"]["iou"]
    assert (many.n, many.images) == (60, 20)
    assert many.interval == pytest.approx(one.interval, abs=1e-12)
    assert "set, 60 held-out samples of 20 images, which the intervals resample" in capsys.readouterr().out


def test_what_is_printed_is_kept(tmp_path, capsys):
    run = run_of(tmp_path / "run", [line(i, 0.2) for i in range(9)], [line(i, 0.5, "new") for i in range(9)])
    report.conclude(run, 1, 400, 1.5e-4, [])
    printed = capsys.readouterr().out
    assert (run / "table.txt").read_text() == printed.lstrip("\n")
    assert "+0.300   [+0.300, +0.300]" in printed and "contains 0" not in printed
    assert "unparsable       0.0%     0.0%    +0.0%   [+0.0%, +0.0%]" in printed


@pytest.mark.parametrize("unseen", [[], ["other"], ["set"]])
def test_a_result_that_did_not_move_says_why_it_may_be(tmp_path, capsys, unseen):
    before = [line(i, 0.2) for i in range(8)] + [line(i, 0.1, "b", dataset="other") for i in range(4)]
    after = [line(0, 0.2, "new"), *before[1:8]] + [line(i, 0.9, "n", dataset="other") for i in range(4)]
    run = run_of(tmp_path / "run", before, after)
    report.conclude(run, 1, 6, 1e-6, unseen)
    (said,) = [x for x in (run / "table.txt").read_text().splitlines() if "contains 0" in x]
    assert said.startswith(
        "set: the interval of its gain in IoU contains 0. 7 of 8 answers are the same text as before; "
    )
    assert "6 updates at a learning rate of at most 1e-06" in said and "stage.optimizer.lr" in said
    assert ("drawn scenes only" in said) == ("set" in unseen)


def test_lines_without_a_cluster_are_their_own_and_images_are_one_across_joined_sets():
    lines = [
        line(0, 1),
        line(1, 1, cluster="image 7"),
        line(0, 1, dataset="b"),
        line(4, 1, cluster="image 7", dataset="b"),
    ]
    assert records.clusters(lines).tolist() == [0, 1, 2, 1]


def test_the_name_of_a_test_set_is_not_read_as_a_pattern(tmp_path):
    for one in ("a", "b"):  # the second part must not take the first one's place
        with records.new_part(tmp_path, "mine[1]", 0) as file:
            file.write(json.dumps(dict.fromkeys(records._NEEDED) | {"dataset": "mine[1]", "id": one}) + "\n")
    assert [line["id"] for line in records.lines(tmp_path, "mine[1]")] == ["a", "b"]


def test_lines_of_an_older_training_are_compared_with_those_of_today(tmp_path, capsys):
    def old(i, iou):
        own = {"dataset": "set", "id": f"s{i}", "text": "same"}
        return own | {"iou": iou, "sm": iou, "mae": 1 - iou, "fault_rate": 0.0}

    run = run_of(tmp_path / "run", [old(i, 0.2) for i in range(9)], [line(i, 0.5) for i in range(9)])
    table = report.conclude(run, 1, 400, 1.5e-4, [])["set"]
    assert (table["iou"].before, table["iou"].after) == (pytest.approx(0.2), 0.5)
    assert table["fault_rate"].gain == 0 and "+0.300" in capsys.readouterr().out
