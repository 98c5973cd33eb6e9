"""Suites, and the datasets of other people, through the real command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluations import EVAL, NANO, datasets, rows, values
from hydra import compose, initialize_config_dir
from PIL import Image

from segrl.data.reasoning import ReasonSeg
from segrl.runs.configuration import asset, check_keys, conf_folder, register_resolvers

SUITES = sorted(path.stem for path in (conf_folder() / "suite").glob("*.yaml"))


# --- other people's datasets


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_composes(suite):
    register_resolvers()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("evaluate", [f"+suite={suite}"])
    check_keys(cfg, "evaluate")
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
        "a", "+testset=duts_te", *NANO, f"testsets.duts_te.root={realdata}/DUTS",
        "testsets.duts_te.published=null", "suite.masks=true",
    )  # fmt: skip
    assert datasets(folder)["duts_te"]["n"] == len({row["id"] for row in rows(folder)}) == 40
    code, _, err = cli(
        f"pred={folder}/masks/duts_te", f"gt={realdata}/DUTS/DUTS-TE/DUTS-TE-Mask", f"out={folder}/s.json",
        "draws=0", module="score", runs=None,
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
    assert (val["giou"], val["ciou"], val["n_acc"], val["t_acc"]) == (0.0, 0.0, 0.0, 0.0)
    assert (a["giou"], a["t_acc"], b["giou"], b["n_acc"]) == (0.0, 0.0, 0.0, 0.0)
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
    code, _, err = cli(
        f"pred={home.parent.parent}/masks/duts_te/one/im",
        f"gt={tmp_path}/set/one/gt",
        module="score",
        runs=None,
    )
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
