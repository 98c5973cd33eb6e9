"""A folder with a card is used as its policy was trained, and a card can ask for nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segrl.data.synthetic import SyntheticScenes
from segrl.models import policy_card
from segrl.runs.configuration import asset
from segrl.segmenter import Segmenter

CARD = {
    "policy": {
        "_target_": "segrl.models.hf_vlm.HFPolicy", "image_side": 128, "pixel_budget": None,
        "temperature": 1.0, "dtype": "float32", "lora": None, "train_vision": True,
        "gradient_checkpointing": False,
    },
    "grammar": {"_target_": "segrl.prompts.tags.SegR1Tags", "max_boxes": 16, "max_points": 64},
    "head": {
        "_target_": "segrl.models.sam2_head.Sam2Head", "architecture": "asset:sam2_nano.yaml",
        "checkpoint": "asset:sam2_nano.safetensors", "decode_batch": 256, "embeddings_kept": 64,
        "embeddings_folder": None,
    },
    "rollout": {"_target_": "segrl.rollout.shared_prefix.SharedPrefixEngine", "max_tokens": 64},
    "precision": {"passes": "32-true"},
}  # fmt: skip
EVAL = (
    "+suite=synthetic", "testsets.synthetic.samples.length=3", "testsets.synthetic.published=3", "logger=csv",
    "trainer=cpu", "data.workers=0", "suite.draws=0", "suite.masks=true",
)  # fmt: skip


def changed(*steps: str, value: object) -> dict:
    card = copy.deepcopy(CARD)
    node = card
    for step in steps[:-1]:
        node = node[step]
    node[steps[-1]] = value
    return card


@pytest.fixture
def model(tmp_path):
    """Return a function from a card to a folder of the shipped policy with that card."""

    def made(card: object, name: str = "model") -> Path:
        folder = tmp_path / name
        shutil.copytree(asset("policy_nano"), folder)
        (folder / "segrl.json").write_text(card if isinstance(card, str) else json.dumps(card))
        return folder

    return made


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "per_sample.jsonl").read_text().splitlines()]


def test_a_segmenter_answers_as_the_evaluation_does(cli, tmp_path, model):
    folder, scenes = model(CARD), SyntheticScenes("test", 3, 0, 128, (0.1, 0.5), (1, 1))
    code, _, err = cli(*EVAL, f"model={folder}", f"paths.run={tmp_path}/a", module="evaluate")
    assert code == 0, err
    segmenter = Segmenter.from_pretrained(folder, weights=tmp_path / "nowhere")
    for row, k in zip(rows(tmp_path / "a"), range(3), strict=True):
        answer = segmenter.segment(scenes[k].image)
        drawn = np.asarray(Image.open(tmp_path / f"a/masks/synthetic/{row['id']}.png")) > 0
        assert answer.text == row["text"] and answer.parsed.prompt.boxes.tolist() == row["boxes"]
        assert (answer.mask == drawn).all() and drawn.any()
        assert (answer.mask & scenes[k].mask).sum() == row["intersection"]
        Image.fromarray(scenes[k].image).save(tmp_path / "scene.png")
        again = segmenter.segment(tmp_path / "scene.png")
        assert again.text == answer.text and (again.mask == answer.mask).all()


def test_a_mask_has_its_images_size(model):
    segmenter = Segmenter.from_pretrained(model(CARD))
    for size in ((40, 57), (200, 131), (1, 1)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        answer = segmenter.segment(image, "the thing")
        assert answer.mask.shape == size and answer.mask.dtype == bool
        turned = segmenter.segment(np.ascontiguousarray(image[::-1])[::-1], "the thing")  # the same, strided
        assert turned.text == answer.text and (turned.mask == answer.mask).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 3)),
        np.zeros((1, 4, 5, 3), np.uint8), np.zeros((3, 4, 5), np.uint8), np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 5, 3), bool),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)  # fmt: skip
def test_an_array_of_another_kind_is_refused(nano_segmenter, image):
    with pytest.raises(ValueError, match=r"image: must be uint8 \[H, W, 3\]; got") as refusal:
        nano_segmenter.segment(image)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def nano_segmenter():
    return Segmenter.from_pretrained(asset("policy_nano"))


def test_a_file_that_is_no_image_is_refused(nano_segmenter, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for path in (tmp_path / "a.png", str(tmp_path / "b.png")):
        with pytest.raises(ValueError, match="must be an image"):
            nano_segmenter.segment(path)


def test_the_card_says_how_and_the_command_line_stands_above_it(cli, tmp_path, model):
    short = model(changed("rollout", "max_tokens", value=3), "short")
    for name, more, faults in (("a", (), 3), ("b", ("rollout.max_tokens=64",), 0)):
        code, _, err = cli(*EVAL, f"model={short}", *more, f"paths.run={tmp_path}/{name}", module="evaluate")
        assert code == 0, err
        assert sum(row["fault"] is not None for row in rows(tmp_path / name)) == faults
    code, _, err = cli(
        *EVAL, f"model={short}", "grammar=seg_r1_points", f"paths.run={tmp_path}/c", module="evaluate"
    )
    assert code == 0, err  # a whole group, too
    assert json.loads((tmp_path / "c" / "metrics.json").read_text())["grammar"] == "SegR1Points"
    (short / "segrl.json").unlink()  # any folder of the family, if the command line says what goes with it
    groups = ("policy=nano", "grammar=seg_r1_tags", "head=sam2_nano")
    for missing in range(3):
        said = (*groups[:missing], *groups[missing + 1 :])
        code, _, err = cli(*EVAL, f"model={short}", *said, f"paths.run={tmp_path}/d", module="evaluate")
        assert code == 2 and err.count("\n") == 1 and groups[missing].partition("=")[0] + "=GROUP" in err
    code, _, err = cli(*EVAL, f"model={short}", *groups, f"paths.run={tmp_path}/d", module="evaluate")
    assert code == 0, err
    assert [r["text"] for r in rows(tmp_path / "d")] == [r["text"] for r in rows(tmp_path / "b")]


@pytest.mark.parametrize(
    ("said", "precision"),
    [
        ((), "bf16-mixed"),
        (("trainer=cpu",), "bf16-mixed"),
        (("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"), "bf16-mixed"),
        (("trainer.devices=1",), "bf16-mixed"),
        (("+experiment=demo",), "bf16-mixed"),
        (("trainer=ddp", "trainer.precision=32-true"), "32-true"),
        (("policy=nano",), "32-true"),
    ],
)
def test_a_cards_precision_survives_all_but_a_precision_and_a_policy(
    cli, model, monkeypatch, said, precision
):
    """A group of the trainer says where an evaluation runs; the card says in which precision."""
    from segrl.runs import evaluation

    taken = []

    class Stub:
        """Stands for an evaluation: keeps what it would have been built from."""

        @staticmethod
        def build(cfg):
            taken.append(cfg)
            return Stub()

        def run(self):
            return None

    monkeypatch.setattr(evaluation, "Evaluation", Stub)
    folder = model(changed("precision", "passes", value="bf16-mixed"))
    arguments = [a for a in EVAL if a != "trainer=cpu"]
    code, _, err = cli(*arguments, *said, f"model={folder}", module="evaluate")
    assert code == 0, err
    assert [cfg.trainer.precision for cfg in taken] == [precision]


def test_a_card_asks_with_its_own_texts_or_with_those_beside_the_weights(model):
    beside = policy_card.read(model(CARD))["grammar"]["instructions"]
    shipped = json.loads((Path(asset("policy_nano")) / "segrl.json").read_text())["grammar"]["instructions"]
    assert beside["seg_r1_tags"] == shipped["seg_r1_tags"]
    asked = {"seg_r1_tags": {"user": "All?"}}
    folder = model(changed("grammar", "instructions", value=asked), "asked")
    said = Segmenter.from_pretrained(folder).grammar.messages(None)
    assert said[-1]["content"][-1]["text"] == "All?"


BAD = {
    "no json": ("{", ["JSON"]),
    "a list": ([], ["policy, grammar, head, rollout, precision"]),
    "a precision that is none": (changed("precision", "passes", value="4-bit"), ["precision.passes"]),
    "a part missing": ({k: v for k, v in CARD.items() if k != "head"}, ["head"]),
    "a part more": ({**CARD, "data": {}}, ["data"]),
    "a place to write to": (changed("head", "embeddings_folder", value="/srv/theirs"),
                            ["head.embeddings_folder", "/srv/theirs"]),
    "foreign code": (changed("grammar", "_target_", value="os.system"), ["grammar._target_", "os.system"]),
    "instructions of this machine": (changed("grammar", "instructions", value="/etc/hostname"),
                                     ["grammar.instructions", "/etc/hostname"]),
    "instructions that are none": (changed("grammar", "instructions", value={"seg_r1_tags": {"refer": "x"}}),
                                   ["seg_r1_tags.refer", "{query}"]),
    "another room": (changed("grammar", "_target_", value="segrl.nano.architecture.write"),
                     ["grammar._target_"]),
    "a longer path": (changed("grammar", "_target_", value="segrl.prompts.tags.re.compile"),
                      ["grammar._target_"]),
    "what is only imported there": (changed("policy", "_target_", value="segrl.models.hf_vlm.Path"),
                                    ["policy._target_"]),
    "an adapter that is none": (changed("grammar", "_target_", value="segrl.prompts.tags.Nothing"),
                                ["grammar._target_"]),
    "a module that is none": (changed("rollout", "_target_", value="segrl.rollout.none.X"),
                              ["rollout._target_"]),
    "no class": (changed("policy", value=None), ["policy._target_"]),
    "called with more": (changed("grammar", "_args_", value=[1]), ["grammar", "_args_"]),
    "foreign code inside": (
        changed("policy", "lora", value={"_target_": "pathlib.Path", "_args_": ["x"]}), ["policy", "pathlib"],
    ),
    "foreign code deeper": (
        changed("policy", "pixel_budget", value=[{"a": {"_target_": "numpy.zeros"}}]),
        ["policy", "numpy.zeros"],
    ),
    "a look at the machine": (changed("policy", "image_side", value="${oc.env:HOME}"), ["policy", "oc.env"]),
    "a checkpoint outside": (
        changed("head", "checkpoint", value="/etc/passwd"), ["head.checkpoint", "/etc/passwd"],
    ),
    "a checkpoint above": (
        changed("head", "checkpoint", value="weights:../x.pt"), ["head.checkpoint", "../x.pt"],
    ),
    "an architecture above": (
        changed("head", "architecture", value="asset:../../x.yaml"), ["head.architecture", "../../x.yaml"],
    ),
    "an architecture outside": (
        changed("head", "architecture", value="configs/sam2/../../x.yaml"), ["head.architecture"],
    ),
    "another type": (changed("policy", "dtype", value="load"), ["policy.dtype", "load"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_card_that_asks_for_something_else_is_refused(cli, tmp_path, model, name):
    card, words = BAD[name]
    folder = model(card)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = cli(*EVAL, f"model={folder}", module="evaluate")
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("segrl: "), err
    assert sorted(tmp_path.rglob("*")) == before
    assert all(word in err for word in ("segrl.json", *words)), err
    with pytest.raises(ValueError, match="segrl.json") as refusal:
        Segmenter.from_pretrained(folder)
    assert f"segrl: {refusal.value}" == err.strip()


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (changed("rollout", "tokens", value=3), ["rollout", "tokens"]),
        (changed("head", "checkpoint", value="weights:absent.pt"), ["head.checkpoint", "absent.pt"]),
    ],
)
def test_a_card_that_cannot_be_followed_is_refused_in_one_line(cli, tmp_path, model, card, words):
    folder = model(card)
    code, _, err = cli(*EVAL, f"model={folder}", module="evaluate")
    assert code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError) as refusal:
        Segmenter.from_pretrained(folder, weights=tmp_path)
    assert all(word in str(refusal.value) for word in words)


def test_a_card_that_was_written_is_read_back(tmp_path):
    policy_card.write(tmp_path, CARD)
    assert policy_card.read(tmp_path) == CARD and policy_card.read(tmp_path / "none") == {}


def test_prefixes_locate_files_in_the_package_or_beside_the_weights():
    assert policy_card.located("asset:sam2_nano.yaml", "w") == asset("sam2_nano.yaml")
    assert policy_card.located("weights:a.pt", Path("w")) == "w/a.pt"
    assert policy_card.located(None, "w") is None and policy_card.located("float32", "w") == "float32"


def test_a_yaml_that_lies_about_is_not_taken_for_one_of_sam2s(model, tmp_path, monkeypatch):
    """In a foreign working directory, segrl must not build what its files say."""
    folder = model(changed("head", "architecture", value="configs/sam2.1/sam2.1_hiera_t.yaml"))
    (folder / "configs" / "sam2.1").mkdir(parents=True)
    bait = "model:\n  _target_: builtins.open\n  file: touched\n  mode: w\n"
    (folder / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml").write_text(bait)
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, RuntimeError)):  # nano weights do not fit the real architecture
        Segmenter.from_pretrained(".")
    assert not (folder / "touched").exists()


def test_a_photograph_is_segmented_as_it_is_shown(model, tmp_path):
    scene = SyntheticScenes("test", 1, 0, 128, (0.3, 0.5), (1, 1))[0].image[:96]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(np.rot90(scene).copy()).save(tmp_path / "turned.png", exif=exif)
    segmenter = Segmenter.from_pretrained(model(CARD))
    turned, shown = segmenter.segment(tmp_path / "turned.png"), segmenter.segment(scene)
    assert turned.mask.shape == (96, 128) and (turned.text, turned.mask.tolist()) == (
        shown.text,
        shown.mask.tolist(),
    )


def test_a_segmenter_uses_the_precision_of_its_card(model):
    assert (
        Segmenter.from_pretrained(model(changed("precision", "passes", value="bf16-mixed"))).passes
        is torch.bfloat16
    )
