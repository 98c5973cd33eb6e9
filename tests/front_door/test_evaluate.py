"""Evaluation through the real command line: every sample once, whatever happens on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from segrl.data.reasoning import ReasonSeg
from segrl.data.synthetic import SyntheticScenes
from segrl.front_door import asset, conf_folder, register_resolvers
from segrl.models.hf_vlm import HFEncoder
from segrl.models.sam2_head import Sam2Head
from segrl.schema import EvaluateConfig

NANO = ("logger=csv", "trainer=cpu", "data.workers=0", "suite.draws=40")
EVAL = ("+suite=synthetic", "testsets.synthetic.samples.length=6", "testsets.synthetic.published=6", *NANO)
SUITES = sorted(path.stem for path in (conf_folder() / "suite").glob("*.yaml"))


@pytest.fixture(scope="module")
def layouts() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "layouts", Path(__file__).parents[1] / "data" / "layouts.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evaluate(cli, tmp_path):
    """Arguments to the folder of an evaluation that went well."""

    def run(name: str, *arguments: str) -> Path:
        code, _, err = cli(*arguments, f"paths.run={tmp_path / name}", module="evaluate")
        assert code == 0, err
        return tmp_path / name

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Arguments to the one line that refuses them, after checking that nothing was written."""

    def run(*arguments: str, runs: Path | None = tmp_path / "runs") -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = cli(*arguments, module="evaluate", runs=runs)
        assert code == 2, (code, out, err)
        (line,) = err.splitlines()
        assert line.startswith("segrl: ") and sorted(tmp_path.rglob("*")) == before
        return line

    return run


def rows(folder: Path, timed: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "per_sample.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timed or k != "seconds"} for line in lines]


def datasets(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())["datasets"]


def values(folder: Path, name: str = "synthetic") -> dict[str, float]:
    return {key: score["value"] for key, score in datasets(folder)[name]["scores"].items()}


def scenes(count: int = 6) -> SyntheticScenes:
    return SyntheticScenes("test", count, 0, 128, (0.1, 0.5), (1, 1))


# --- one evaluation


def test_a_line_per_sample_a_table_and_the_scores_of_both(cli, tmp_path):
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
        "config.yaml", "masks", "metrics.csv", "metrics.json", "overlays", "per_sample.jsonl", "provenance.json", "weights.json",
    ]  # fmt: skip
    assert len(list((folder / "overlays/synthetic").iterdir())) == 6


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
        f"pred={folder}/masks/synthetic", f"gt={tmp_path}/gt", f"metrics=[{','.join(metrics)}]", f"out={tmp_path}/s.json",
        "draws=30", module="score", runs=None,
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
    """How many images the mask head has seen; it dies before the one numbered `dies_at`."""
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
    code, out, err = cli(f"resume={cut}", module="evaluate", runs=None)
    assert code == 0, err
    assert heads["seen"] == 1 and "5 of 6 were there" in out
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
        [*command, "trainer.accelerator=cpu", "trainer.devices=2", f"paths.run={tmp_path}/two", "suite.batch_size=2"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert rows(one) == rows(tmp_path / "two") and datasets(one) == datasets(tmp_path / "two")
    assert done.stdout.count("unparsable") == 1 and not (tmp_path / "two/per_sample.parts").exists()
    assert len(list((tmp_path / "two/masks/synthetic").iterdir())) == 5


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["testsets.synthetic.published=7"], ["testsets.synthetic", "7", "6", "prepare check"]),
        (["+suite=sof"], ["suite", "sod"]),
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
        (["trainer.devices=0"], ["trainer: ", "0"]),
        (["trainer.precision=8"], ["trainer: ", "8"]),
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
        policy = HFPolicy(weights, 128, None, 1.0, "float32", "sdpa", None, True)
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


# --- other people's datasets


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_composes(suite):
    register_resolvers()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("evaluate", [f"+suite={suite}"])
    EvaluateConfig.model_validate(OmegaConf.to_container(cfg, resolve=True))
    assert cfg.suite.name == suite and cfg.testsets
    for one in cfg.testsets.values():
        assert one.source and one.licence and one.samples.get("side") is None


def test_reasonseg_leaves_ignored_pixels_out(evaluate, realdata, tmp_path):
    root = tmp_path / "datasets" / "ReasonSeg"
    root.mkdir(parents=True)
    for split in ("val", "test"):
        (root / split).symlink_to(realdata / "reasonseg_style" / "val")
    published = [
        f"testsets.reasonseg_{split}.published={count}" for split, count in (("val", "null"), ("test", 8))
    ]
    folder = evaluate(
        "a", "+suite=reason", *NANO, f"paths.datasets={root.parent}", *published, "suite.masks=true"
    )
    samples, sums, overlaps = ReasonSeg(str(root), "val", False, None), np.zeros(2), []
    found = [row for row in rows(folder) if row["dataset"] == "reasonseg_val"]
    for k, row in enumerate(found):
        sample = samples[k]
        mask = np.asarray(Image.open(folder / f"masks/reasonseg_val/{sample.id}.png")) > 0
        counts = np.ones_like(mask) if sample.ignore is None else ~sample.ignore
        here = np.array([(mask & sample.mask & counts).sum(), ((mask | sample.mask) & counts).sum()])
        assert (row["intersection"], row["union"], row["query"]) == (*here, sample.query)
        sums, overlaps = sums + here, [*overlaps, here[0] / here[1]]
    assert values(folder, "reasonseg_val")["giou"] == pytest.approx(np.mean(overlaps), abs=1e-12)
    assert values(folder, "reasonseg_val")["ciou"] == pytest.approx(sums[0] / sums[1], abs=1e-12)
    assert values(folder, "reasonseg_val") == values(folder, "reasonseg_test")
    assert len(rows(folder)) == 16 and datasets(folder)["reasonseg_val"]["published"] is None


def test_real_photographs_at_their_own_sizes(cli, evaluate, realdata):
    folder = evaluate(
        "a", "+testset=duts_te", *NANO, f"testsets.duts_te.root={realdata}/DUTS", "testsets.duts_te.published=null",
        "suite.masks=true",
    )  # fmt: skip
    assert datasets(folder)["duts_te"]["n"] == len({row["id"] for row in rows(folder)}) == 40
    code, _, err = cli(
        f"pred={folder}/masks/duts_te", f"gt={realdata}/DUTS/DUTS-TE/DUTS-TE-Mask", f"out={folder}/s.json", "draws=0",
        module="score", runs=None,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((folder / "s.json").read_text())
    assert {name: found[name] for name in values(folder, "duts_te")} == values(folder, "duts_te")


def test_grefcoco_counts_sentences_that_name_nothing(evaluate, layouts, tmp_path):
    refs = [
        layouts.ref(k, split, ann, (f"{split} {k}",))
        for k, (split, ann) in enumerate(
            [("val", [11]), ("val", [-1]), ("testA", [11, 12]), ("testB", [-1])], 1
        )
    ]
    layouts.coco(
        tmp_path / "datasets/refer", "images/mscoco/images/train2014", "grefcoco", "grefs(unc).json", refs
    )
    folder = evaluate(
        "a", "+suite=grefer", *NANO, f"paths.datasets={tmp_path}/datasets", "rollout.max_tokens=3"
    )
    assert [row["id"] for row in rows(folder)] == ["1-10", "2-20", "3-30", "4-40"]
    val, a, b = (values(folder, f"grefcoco_{split}") for split in ("val", "testa", "testb"))
    assert (val["giou"], val["ciou"], val["n_acc"], val["t_acc"]) == (0.5, 0.0, 0.0, 0.0)
    assert (a["giou"], a["t_acc"], b["giou"], b["n_acc"]) == (0.0, 0.0, 1.0, 0.0)
    assert a["n_acc"] is b["t_acc"] is b["ciou"] is None  # all were faults: nothing drawn


def test_ignored_regions_are_refused_by_scores_that_do_not_know_them(cli, tmp_path):
    root = tmp_path / "reason"
    root.mkdir()
    code, _, err = cli(
        "+testset=reasonseg_val",
        *NANO,
        f"testsets.reasonseg_val.root={root}",
        f"paths.run={tmp_path}/x",
        module="evaluate",
    )
    assert code == 2 and "scores=referring" in err and err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_sets_are_joined_where_a_suite_says_so(evaluate):
    sets = ("+testsets.other=${testsets.synthetic}", "+suite.unions.all=[synthetic,other]")
    folder = evaluate("a", *EVAL, *sets)
    found = datasets(folder)
    assert found["all"]["n"] == 12 and len(rows(folder)) == 12
    for name, score in found["all"]["scores"].items():
        assert score["value"] == pytest.approx(found["synthetic"]["scores"][name]["value"], abs=1e-12)


def test_an_evaluation_does_not_go_on_with_other_weights(cli, evaluate, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(asset("policy_nano"), model)
    folder = evaluate("a", *EVAL, f"model={model}")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    code, _, err = cli(f"resume={folder}", module="evaluate", runs=None)
    assert code == 2 and "model.safetensors" in err and err.count("\n") == 1


def test_ids_with_slashes_make_folders_that_can_be_scored(cli, evaluate, layouts, tmp_path):
    for part in ("one", "two"):
        layouts.folders(tmp_path / "set", f"{part}/im", f"{part}/gt", ("x", "y"))
    places = "[{images: one/im, masks: one/gt}, {images: two/im, masks: two/gt}]"
    own = ("+testset=duts_te", *NANO, f"testsets.duts_te.root={tmp_path}/set", "testsets.duts_te.published=4")
    folder = evaluate(
        "a", *own, f"testsets.duts_te.samples.folders={places}", "suite.masks=true", "suite.overlays=true"
    )
    assert [row["id"] for row in rows(folder)] == ["one/im/x", "one/im/y", "two/im/x", "two/im/y"]
    for kind in ("masks", "overlays"):
        home = folder / kind / "duts_te"
        assert sorted(p.relative_to(home).as_posix() for p in home.rglob("*.png")) == [
            f"{part}/im/{stem}.png" for part in ("one", "two") for stem in "xy"
        ]
    code, _, err = cli(f"pred={home.parent.parent}/masks/duts_te/one/im", f"gt={tmp_path}/set/one/gt", module="score", runs=None)  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize("name", ["../../../escape", "{tmp}/escape", "a/../../b", "a\0b"])
def test_an_id_cannot_leave_the_folder_of_masks(cli, refused, layouts, tmp_path, name):
    layouts.folders(tmp_path / "set", "im", "gt", ("x",))
    name = name.format(tmp=tmp_path)
    (tmp_path / "set" / "list.jsonl").write_text(
        json.dumps({"image": "im/x.JPG", "mask": "gt/x.PNG", "id": name}) + "\n"
    )
    own = (
        "data=jsonl",
        f"data.train={tmp_path}/set/list.jsonl",
        f"data.test={tmp_path}/set/list.jsonl",
        *NANO,
    )
    for kind in ("masks", "overlays"):
        assert repr(name) in refused(*own, f"suite.{kind}=true")
    code, _, err = cli(*own, f"paths.run={tmp_path}/a", module="evaluate")  # nothing is named by it
    assert code == 0 and rows(tmp_path / "a")[0]["id"] == name, err


def test_an_id_that_is_there_twice_is_refused(refused, layouts, tmp_path):
    layouts.folders(tmp_path / "set", "im", "gt", ("x", "y"))
    twice = "[{images: im, masks: gt}, {images: im, masks: gt}]"
    own = (
        "+testset=duts_te",
        *NANO,
        f"testsets.duts_te.root={tmp_path}/set",
        "testsets.duts_te.published=null",
    )
    assert "im/x" in refused(*own, f"testsets.duts_te.samples.folders={twice}")
