"""Evaluation through the real command line: every sample is scored once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from evaluations import EVAL, NANO, datasets, rows, scenes, values
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from segrl.models.hf_vlm import HFEncoder
from segrl.models.sam2_head import Sam2Head
from segrl.prompts.instructions import digest
from segrl.runs.command import refusal
from segrl.runs.configuration import asset, compose_job

# --- one evaluation


def test_an_evaluation_writes_a_line_per_sample_a_table_and_its_scores(cli, tmp_path):
    code, out, err = cli(
        *EVAL, "suite.masks=true", "suite.overlays=true", f"paths.run={tmp_path}/a", module="evaluate"
    )
    assert code == 0, err
    folder, samples = tmp_path / "a", scenes()
    found = rows(folder, timed=True)
    assert [row["id"] for row in found] == samples.ids and {row["dataset"] for row in found} == {"synthetic"}
    for row, k in zip(found, range(6), strict=True):
        mask, truth = np.asarray(Image.open(folder / f"masks/synthetic/{row['id']}.png")), samples[k].mask
        assert set(np.unique(mask)) <= {0, 255} and mask.shape == truth.shape
        assert row["intersection"] == ((mask > 0) & truth).sum()
        assert row["union"] == ((mask > 0) | truth).sum() and row["seconds"] > 0
        assert row["fault"] is None and len(row["points"]) == len(row["labels"])
    report = json.loads((folder / "metrics.json").read_text())
    assert (report["suite"], report["answers"], report["head"]) == (
        "synthetic",
        "greedy",
        "sam2_nano.safetensors",
    )
    of = report["datasets"]["synthetic"]
    assert (of["n"], of["published"], of["fault_rate"]) == (6, 6, 0.0)
    iou = [row["intersection"] / row["union"] for row in found]
    assert of["scores"]["iou"]["value"] == pytest.approx(np.mean(iou), abs=1e-12)
    cut, either = (sum(row[name] for row in found) for name in ("intersection", "union"))
    assert of["scores"]["ciou"]["value"] == pytest.approx(cut / either, abs=1e-12)
    low, high = of["scores"]["iou"]["interval"]
    assert f"{np.mean(iou):.4f} [{low:.4f}, {high:.4f}]" in out and "pysodmetrics" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "masks", "metrics.csv", "metrics.json", "overlays", "per_sample.jsonl",
        "provenance.json", "table.txt", "weights.json",
    ]  # fmt: skip
    assert len(list((folder / "overlays/synthetic").iterdir())) == 6
    table = (folder / "table.txt").read_text()
    assert f"instructions: {digest(instantiate(OmegaConf.load(folder / 'config.yaml').grammar))}\n" in table
    assert table in out and "unparsable: synthetic 0.0%" in table and "head_precision: float32" in table
    assert of["images"] == 6 and "intervals resample" not in table  # a scene each


def test_neither_batches_nor_another_time_change_a_score(evaluate):
    ones, eights = (
        evaluate("one", *EVAL, "suite.batch_size=1"),
        evaluate("eight", *EVAL, "suite.batch_size=8"),
    )
    assert rows(ones) == rows(eights) == rows(evaluate("again", *EVAL))
    assert datasets(ones) == datasets(eights)


def test_what_is_drawn_is_a_function_of_seed_and_id_alone(evaluate):
    drawn = (*EVAL, "suite.greedy=false")
    first = evaluate("first", *drawn, "suite.batch_size=4")
    assert rows(first) == rows(evaluate("again", *drawn, "suite.batch_size=1"))
    fewer = evaluate("fewer", *drawn, "testsets.synthetic.samples.length=3", "testsets.synthetic.published=3")
    assert rows(fewer) == rows(first)[:3]
    assert rows(first) != rows(evaluate("other", *drawn, "seed=2"))
    assert rows(first) != rows(evaluate("greedy", *EVAL))


def test_the_masks_scored_as_files_give_the_same_digits(cli, evaluate, tmp_path):
    folder = evaluate("run", *EVAL, "suite.masks=true", "scores=dis", "suite.draws=30")
    metrics = list(values(folder))
    (tmp_path / "gt").mkdir()
    samples = scenes()
    for k in range(6):
        Image.fromarray(samples[k].mask).save(tmp_path / "gt" / f"{samples.ids[k]}.png")
    code, out, err = cli(
        f"pred={folder}/masks/synthetic", f"gt={tmp_path}/gt", f"metrics=[{','.join(metrics)}]",
        f"out={tmp_path}/s.json", "draws=30", module="score", runs=None,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "s.json").read_text())
    assert {name: found[name] for name in metrics} == values(folder)
    assert found["intervals"] == {
        k: s["interval"] for k, s in datasets(folder)["synthetic"]["scores"].items()
    }


def test_a_faulty_completion_is_an_empty_mask_and_counts(evaluate, monkeypatch):
    cut_off = evaluate("cut", *EVAL, "rollout.max_tokens=3", "suite.masks=true")
    assert datasets(cut_off)["synthetic"]["fault_rate"] == 1.0
    samples = scenes()
    for k, row in enumerate(rows(cut_off)):
        assert (row["intersection"], row["union"]) == (0, samples[k].mask.sum()) and row["fault"]
        assert not np.asarray(Image.open(cut_off / f"masks/synthetic/{row['id']}.png")).any()
    assert values(cut_off)["iou"] == values(cut_off)["ciou"] == 0
    decode = HFEncoder.decode
    monkeypatch.setattr(HFEncoder, "decode", lambda *a: ["no answer", *decode(*a)[1:]])
    one = evaluate("one", *EVAL)
    assert datasets(one)["synthetic"]["fault_rate"] == pytest.approx(1 / 6)
    assert [row["fault"] is None for row in rows(one)] == [False] + [True] * 5
    assert rows(one)[0]["intersection"] == rows(one)[0]["scores"]["iou"] == 0 and "boxes" not in rows(one)[0]


# --- kills


class Killed(BaseException):
    """Stands for a kill: nothing in the evaluation may catch it."""


@pytest.fixture
def heads(monkeypatch):
    """Count the images that the mask head has seen; it raises at the one numbered `dies_at`."""
    segment, state = Sam2Head.segment, {"seen": 0, "dies_at": -1}

    def counted(head, images, prompts):
        if 0 <= state["dies_at"] <= state["seen"]:
            raise Killed
        state["seen"] += len(images)
        return segment(head, images, prompts)

    monkeypatch.setattr(Sam2Head, "segment", counted)
    return state


@pytest.mark.parametrize("greedy", ["true", "false"])
def test_a_killed_evaluation_goes_on_and_does_nothing_twice(cli, evaluate, tmp_path, heads, greedy):
    arguments = (*EVAL, "suite.batch_size=2", f"suite.greedy={greedy}")
    whole = evaluate("whole", *arguments)
    heads.update(seen=0, dies_at=4)
    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        cli(*arguments, f"paths.run={cut}", module="evaluate")
    assert not (cut / "metrics.json").exists() and not (cut / "per_sample.jsonl").exists()
    (part,) = (cut / "per_sample.parts").iterdir()
    assert len(part.read_text().splitlines()) == 4
    part.write_bytes(part.read_bytes()[:-200])  # inside the fourth line
    heads.update(seen=0, dies_at=2)
    with pytest.raises(Killed):
        cli(f"resume={cut}", module="evaluate", runs=None)
    heads.update(seen=0, dies_at=-1)
    asked = (cut / "config.yaml").read_text()
    (cut / "config.yaml").write_text(asked.replace("Identify and segment {query}.", "Segment {query}."))
    code, _, err = cli(f"resume={cut}", module="evaluate", runs=None)
    assert code == 2 and "instructions changed since" in err
    (cut / "config.yaml").write_text(asked)
    code, out, err = cli(f"resume={cut}", module="evaluate", runs=None)
    assert code == 0, err
    assert heads["seen"] == 1 and "5 of 6 were answered before" in out
    assert rows(cut) == rows(whole) and datasets(cut) == datasets(whole)
    assert not (cut / "per_sample.parts").exists()
    done = (cut / "per_sample.jsonl").read_bytes()
    heads.update(seen=0)
    code, _, err = cli(f"resume={cut}", module="evaluate", runs=None)
    assert code == 0 and heads["seen"] == 0 and (cut / "per_sample.jsonl").read_bytes() == done, err


def test_a_mask_that_could_not_be_written_is_written_after_all(cli, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def full(image, path, *rest):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device", str(path))
        save(image, path, *rest)

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = cli(*EVAL, "suite.masks=true", f"paths.run={tmp_path}/a", module="evaluate")
    assert code == 2 and "no space" in err
    code, _, err = cli(f"resume={tmp_path}/a", module="evaluate", runs=None)
    assert code == 0, err
    masks = sorted(p.stem for p in (tmp_path / "a/masks/synthetic").iterdir())
    assert masks == scenes().ids == [row["id"] for row in rows(tmp_path / "a")]


def test_what_is_resumed_is_an_evaluation_with_its_own_configuration(cli, refused, evaluate, tmp_path):
    assert "resume" in refused(f"resume={tmp_path}/nowhere", runs=None)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("stage: {}\n")
    assert "foreign" in refused(f"resume={tmp_path}/foreign", runs=None)
    done = evaluate("done", *EVAL)
    assert "suite.batch_size=1" in refused(f"resume={done}", "suite.batch_size=1", runs=None)


def test_two_processes_equal_one(evaluate, tmp_path):
    five = (
        *EVAL,
        "testsets.synthetic.samples.length=5",
        "testsets.synthetic.published=5",
        "suite.masks=true",
    )
    one = evaluate("one", *five)
    command = [
        sys.executable,
        "-m",
        "segrl.evaluate",
        *(a for a in five if a != "trainer=cpu"),
        "trainer=ddp",
    ]
    done = subprocess.run(
        [*command, "trainer.accelerator=cpu", "trainer.devices=2", f"paths.run={tmp_path}/two",
         "suite.batch_size=2"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert rows(one) == rows(tmp_path / "two") and datasets(one) == datasets(tmp_path / "two")
    assert done.stdout.count("unparsable") == 1 and not (tmp_path / "two/per_sample.parts").exists()
    assert len(list((tmp_path / "two/masks/synthetic").iterdir())) == 5


def test_a_test_set_that_grew_is_finished_by_a_resume(cli, tmp_path):
    from PIL import Image

    def put(count):
        for i, scene in enumerate(scenes(count)):
            for kind, pixels in (("images", scene.image), ("masks", scene.mask)):
                (tmp_path / "mine/test" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "mine/test" / kind / f"{i}.png")

    put(2)
    run = f"{tmp_path}/grown"
    mine = ("data=image_mask", f"data.root={tmp_path}/mine", f"paths.run={run}", *NANO)
    assert cli(*mine, module="evaluate", runs=None)[0] == 0
    put(3)
    code, out, err = cli(f"resume={run}", module="evaluate", runs=None)
    assert code == 0 and "2 of 3 were answered before" in out, err
    assert [row["id"] for row in rows(tmp_path / "grown")] == ["0", "1", "2"]


def test_a_list_is_scored_without_a_training_list(cli, tmp_path):
    from PIL import Image

    lines = []
    for i, scene in enumerate(scenes(2)):
        Image.fromarray(scene.image).save(tmp_path / f"i{i}.png")
        Image.fromarray(scene.mask).save(tmp_path / f"m{i}.png")
        lines.append(f'{{"image": "i{i}.png", "mask": "m{i}.png"}}\n')
    (tmp_path / "list.jsonl").write_text("".join(lines))
    given = ("data=jsonl", f"data.test={tmp_path}/list.jsonl", f"paths.run={tmp_path}/listed", *NANO)
    code, _, err = cli(*given, module="evaluate", runs=None)
    assert code == 0, err
    assert [row["id"] for row in rows(tmp_path / "listed")] == ["i0", "i1"]


@pytest.mark.parametrize("name", ["test/synthetic/structure", "test/all/sm", "val/synthetic/sm"])
def test_what_a_sweep_compares_is_a_score_before_anything_is_segmented(refused, monkeypatch, name):
    monkeypatch.setattr(Sam2Head, "segment", None)
    line = refused(*EVAL, f"objective_metric={name}")
    assert line.startswith("segrl: objective_metric: must be null or one of test/synthetic/") and name in line


@pytest.mark.parametrize("scores", ["saliency", "dis", "referring", "generalized_referring"])
def test_a_family_names_the_scores_that_it_gives(scores):
    family = instantiate(compose_job("score", [f"scores={scores}", "pred=a", "gt=b"]).scores)
    half = np.arange(64).reshape(8, 8) % 2 == 0
    assert tuple(family.summary(family.parts(half.astype(np.uint8) * 255, half, None))) == family.names


def test_the_rows_of_unions_may_be_compared():
    joined = "+suite.unions.all=[synthetic]"
    assert refusal("evaluate", ["+suite=synthetic", joined, "objective_metric=test/all/sm"]) is None


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["testsets.synthetic.published=7"], ["testsets.synthetic", "7", "6", "prepare check"]),
        (["+suite=sof"], ["suite", "sod"]),
        (["testset=cod10k"], ["testset", "+testset=NAME"]),
        (["data=jsonl"], ["data: ", "+suite"]),
        (["scores=salience"], ["scores", "saliency"]),
        (["suite.batch_size=0"], ["suite.batch_size"]),
        (["suite.draws=-1"], ["suite.draws"]),
        (["suite.gredy=true"], ["suite.gredy", "suite.greedy"]),
        (["scores.metrics=[sm,foo]"], ["metrics", "foo"]),
        (["scores=referring", "scores.ignore=drop"], ["scores.ignore", "drop"]),
        (["ckpt_path=last.ckpt"], ["ckpt_path", "init_from"]),
        (["init_from=nowhere.ckpt"], ["init_from", "nowhere.ckpt"]),
        (["model=nowhere"], ["model", "nowhere", "config.json"]),
        (["policy.weights=nowhere"], ["policy.weights", "nowhere"]),
        (["head.checkpoint=nowhere.pt"], ["head.checkpoint", "nowhere.pt"]),
        (["trainer.accelerator=gpu"], ["trainer: "]),
        (["trainer.devices=0"], ["trainer.devices: ", "0"]),
        (["trainer.precision=8"], ["trainer.precision: ", "8"]),
        (["testsets.synthetic.samples.length=0"], ["length", "0"]),
    ],
)  # fmt: skip
def test_one_line_names_what_is_wrong(refused, arguments, words):
    if arguments == ["trainer.accelerator=gpu"] and torch.cuda.is_available():
        pytest.skip("there is one")
    line = refused(*(NANO if arguments[0].startswith("+suite") else EVAL), *arguments)
    assert all(word in line for word in words), line


def test_a_root_that_is_missing_is_named_with_its_owners(refused, tmp_path):
    line = refused("+suite=sod", *NANO, f"paths.datasets={tmp_path}/nowhere")
    assert "testsets.duts_te.root" in line and "nowhere/DUTS" in line and "saliencydetection.net" in line


def test_a_checkpoint_is_a_policys_of_this_architecture(refused, evaluate, tmp_path, nano_weights):
    from segrl.models.hf_vlm import HFPolicy

    def saved(name: str, state: dict) -> str:
        torch.save({"state_dict": state}, tmp_path / name)
        return f"init_from={tmp_path / name}"

    def state(weights: str) -> dict:
        policy = HFPolicy(weights, 128, None, 1.0, "float32", None, True, False)
        return {f"policy.{name}": value for name, value in policy.state_dict().items()}

    ours = state(asset("policy_nano"))
    for name, line in (
        ("none.ckpt", saved("none.ckpt", {"head.x": torch.zeros(1)})),
        ("other.ckpt", saved("other.ckpt", state(str(nano_weights("qwen3_vl"))))),
        ("less.ckpt", saved("less.ckpt", dict(list(ours.items())[:5]))),
    ):
        told = refused(*EVAL, line)
        assert "init_from" in told and name in told
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("none")
    for name in ("foreign.ckpt", "text.ckpt"):
        assert name in refused(*EVAL, f"init_from={tmp_path / name}")
    same = saved("same.ckpt", ours)
    assert rows(evaluate("a", *EVAL, same)) == rows(evaluate("b", *EVAL))
    silent = saved("silent.ckpt", {k: torch.zeros_like(v) for k, v in ours.items()})
    assert datasets(evaluate("c", *EVAL, silent, "rollout.max_tokens=8"))["synthetic"]["fault_rate"] == 1.0
