"""An exported policy is the checkpoint's: for segrl, for plain transformers, and in its card."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from segrl.data.synthetic import SyntheticScenes
from segrl.prompts.instructions import NAME, read
from segrl.segmenter import Segmenter

SMALL = ("logger=csv", "trainer.accelerator=cpu", "data.train_length=64", "data.test_length=4",
         "test_before=false", "trainer.max_steps=2", "data.batch_size=2", "stage.group_size=2",
         "stage.micro_batch_size=2", "data.workers=0")  # fmt: skip


@pytest.fixture
def exported(cli, tmp_path):
    """Return a run, and the folder made of it."""

    def export(*overrides):
        run, out = tmp_path / "run", tmp_path / "policy"
        code, _, err = cli(
            "+experiment=demo", *SMALL, "stage.optimizer.lr=1e-3", f"paths.run={run}", *overrides
        )
        assert code == 0, err
        code, said, err = cli(f"ckpt={run}/checkpoints/last.ckpt", f"out={out}", module="export", runs=None)
        assert code == 0, err
        assert str(out) in said
        return run, out

    return export


def test_the_folder_answers_as_the_checkpoint_does(cli, exported, tmp_path):
    run, out = exported()
    suite = (
        "+suite=synthetic",
        "testsets.synthetic.samples.length=4",
        "testsets.synthetic.published=4",
        "logger=csv",
    )
    own = (f"init_from={run}/checkpoints/last.ckpt", "rollout.max_tokens=40")
    lines = []
    for name, source in (("own", own), ("folder", (f"model={out}",))):
        code, _, err = cli(*suite, *source, f"paths.run={tmp_path}/{name}", module="evaluate")
        assert code == 0, err
        rows = (tmp_path / name / "per_sample.jsonl").read_text().splitlines()
        lines.append([{**json.loads(row), "seconds": 0} for row in rows])
    assert lines[0] == lines[1]
    segmenter = Segmenter.from_pretrained(out)
    scene = SyntheticScenes("test", 4, 0, 128, (0.1, 0.5), (1, 1))[2]
    answer = segmenter.segment(scene.image)
    assert answer.text == lines[0][2]["text"]
    assert answer.mask.shape == scene.mask.shape
    assert np.count_nonzero(answer.mask & scene.mask) == lines[0][2]["intersection"]


@pytest.mark.parametrize(
    "lora",
    [(), ("policy.lora={rank: 4, alpha: 8, dropout: 0.0}", "stage.optimizer.lr=1e-2")],
    ids=["weights", "adapter"],
)
def test_plain_transformers_generates_the_same_text(exported, lora):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, out = exported(*lora)
    scene = SyntheticScenes("test", 4, 0, 128, (0.1, 0.5), (1, 1))[0]
    segmenter = Segmenter.from_pretrained(out)
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    ours = segmenter.policy.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    prefix = segmenter.policy.encoder.encode(segmenter.grammar.messages(None), scene.image)
    ids = model.generate(
        input_ids=prefix.token_ids[None], mm_token_type_ids=prefix.token_types[None],
        pixel_values=prefix.pixels, image_grid_thw=prefix.grid,
        attention_mask=torch.ones_like(prefix.token_ids[None]),
    )  # fmt: skip
    text = processor.tokenizer.decode(ids[0, len(prefix.token_ids) :], skip_special_tokens=True)
    assert text == segmenter.segment(scene.image).text


def test_the_card_says_where_the_numbers_come_from(exported, cli, tmp_path):
    run, out = exported()
    inside = cli(
        "ckpt=last.ckpt", f"out={tmp_path}/inside", module="export", runs=None, cwd=run / "checkpoints"
    )
    assert inside[0] == 0, inside[2]
    assert (tmp_path / "inside" / "README.md").read_text() == (out / "README.md").read_text()
    mine = OmegaConf.load(run / "config.yaml")
    mine.reward.terms.iou.fn._target_ = "nobodys.module.area"  # a part of one's own, which is not looked at
    OmegaConf.save(mine, run / "config.yaml")
    (run / "metrics.json").write_text(
        (run / "metrics.json").read_text().replace('"scored_step": 2', '"scored_step": 1')
    )
    code, _, err = cli(
        f"ckpt={run}/checkpoints/last.ckpt", f"out={tmp_path}/mine", module="export", runs=None
    )
    assert code == 0, err
    described = (tmp_path / "mine" / "README.md").read_text()
    assert "nobodys.module.area" in described and "`last.ckpt`, has not been scored" in described
    card = (out / "README.md").read_text()
    for words in (
        " +experiment=demo logger=csv",
        "commit ",
        "SyntheticScenes",
        "| test/synthetic/sm |",
        "group_size: 2",
    ):
        assert words in card
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["do_sample"] is False and generation["max_new_tokens"] == 40
    weights = out / "model.safetensors"
    assert weights.stat().st_mode == (out / "config.json").stat().st_mode
    assert "<|im_start|>user" in card and "128x128" in card  # what it is asked
    assert "QUERY" not in card  # it was trained with none
    front = card.split("---")[1].splitlines()
    assert {"license: apache-2.0", "library_name: transformers"} <= set(front)


def test_the_folder_is_asked_as_the_policy_was_trained_wherever_the_file_went(cli, exported, tmp_path):
    asked = tmp_path / "asked.yaml"
    asked.write_text("seg_r1_tags: {user: 'All of it?', refer: 'Only {query}'}")
    run, out = exported(f"grammar.instructions={asked}", "trainer.max_steps=1")
    assert "All of it?" in (run / "config.yaml").read_text()
    asked.unlink()
    card = json.loads((out / "segrl.json").read_text())
    texts = card["grammar"]["instructions"]["seg_r1_tags"]
    assert (texts["user"], texts["refer"]) == ("All of it?", "Only {query}") and "system" in texts
    assert (
        str(tmp_path) not in (out / "segrl.json").read_text()
        and "All of it?" in (out / "README.md").read_text()  # it was trained without queries
    )
    said = Segmenter.from_pretrained(out).grammar.messages("it")
    assert said[-1]["content"][-1]["text"] == "Only it"
    assert (
        read(out / NAME)["seg_r1_tags"] == texts
    )  # training that starts from the folder uses the same instructions
    scored = (
        f"model={out}",
        f"paths.run={tmp_path}/scored",
        "logger=csv",
        "suite.draws=0",
        "rollout.max_tokens=2",
    )
    code, _, err = cli(
        "+suite=synthetic", "testsets.synthetic.samples.length=1", "testsets.synthetic.published=1", *scored,
        module="evaluate",
    )  # fmt: skip
    assert code == 0, err
    assert "Only {query}" in (tmp_path / "scored" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no file"),
        ("seg_r1_tags: {refer: x}", "{query}"),
        ("sam_r1_json: {}", "must have the section seg_r1_tags"),
    ],
)
def test_instructions_that_cannot_be_are_refused_before_anything_is_made(cli, tmp_path, content, words):
    asked = tmp_path / "asked.yaml"
    if content is not None:
        asked.write_text(content)
    for module, what in (("train", "+experiment=demo"), ("evaluate", "+suite=synthetic")):
        code, _, err = cli(
            what, "logger=csv", f"grammar.instructions={asked}", f"paths.run={tmp_path}/no", module=module
        )
        assert code == 2 and err.count("\n") == 1 and words in err, err
        assert str(asked) in err or "grammar.instructions: " in err  # a file that is whole was taken in
        assert not (tmp_path / "no").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("ckpt", "word"),
    [
        ("nothing.ckpt", "does not exist"),
        ("policy", "a folder"),
        ("policy/mine.txt", "config.yaml"),
        ("run/checkpoints/last.ckpt", "out"),
    ],
    ids=["no file", "a folder", "no run", "out exists"],
)
def test_what_cannot_be_exported_is_said_in_one_line(cli, tmp_path, ckpt, word):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.txt").write_text("mine")
    out = "policy" if word == "out" else "other"
    code, _, err = cli(f"ckpt={tmp_path}/{ckpt}", f"out={tmp_path}/{out}", module="export", runs=None)
    assert code == 2 and err.count("\n") == 1 and word in err
    assert not (tmp_path / "other").exists() and len(list((tmp_path / "policy").iterdir())) == 1
