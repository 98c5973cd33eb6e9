"""A card's licence follows from the base model and the data; where one is unknown, none is stated."""

import pytest
from omegaconf import OmegaConf

from segrl.runs import licences
from segrl.runs.configuration import asset, register_resolvers

QWEN = "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct"


def config(weights, loader="SyntheticScenes", **more):
    register_resolvers()
    return OmegaConf.create({
        "policy": {"weights": str(weights)}, "sources": {"policy.weights": QWEN}, "init_from": None,
        "data": {"module": {"train": {"_target_": f"segrl.data.any.{loader}"}}, **more.pop("data", {})},
        **more,
    })  # fmt: skip


@pytest.fixture
def qwen(tmp_path):
    folder = tmp_path / "Qwen2.5-VL-3B-Instruct"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen-research\n---\n# Qwen\nlicense: mit\n"
    )
    return folder


def test_the_nano_policy_on_drawn_scenes_is_apache():
    assert licences.of(config(asset("policy_nano"))) == ({"license": "apache-2.0"}, "")


def test_a_base_model_keeps_its_terms(qwen):
    front, sentence = licences.of(config(qwen))
    assert front == {
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct", "license": "other", "license_name": "qwen-research"
    } and not sentence  # fmt: skip


def test_terms_of_the_data_leave_no_licence_to_assert(qwen):
    cod = {"licence": "COD10K: non-commercial purposes only", "root": "datasets"}
    front, sentence = licences.of(config(qwen, "ImageMaskFolders", data=cod))
    assert front["license"] == "other" and "license_name" not in front
    assert "under qwen-research" in sentence and "non-commercial purposes only" in sentence
    front, sentence = licences.of(config(asset("policy_nano"), "ImageMaskFolders", data={"root": "mine"}))
    assert front == {"license": "other"} and "data of `mine` (licence not stated)" in sentence


def test_weights_that_state_nothing_are_under_no_known_licence(tmp_path):
    front, sentence = licences.of(config(tmp_path))
    assert front == {"license": "other"} and "with no licence stated beside its weights" in sentence
    (tmp_path / "LICENSE").write_text("        Apache License\n      Version 2.0, January 2004\n")
    assert licences.of(config(tmp_path)) == ({"license": "apache-2.0"}, "")


def test_a_licence_takes_in_what_the_run_started_from(qwen, tmp_path):
    first = tmp_path / "first"
    (first / "checkpoints").mkdir(parents=True)
    OmegaConf.save(
        config(qwen, "ChatTraces", data={"licence": "FCoT's", "root": "fcot"}), first / "config.yaml"
    )
    last = first / "checkpoints" / "last.ckpt"
    front, sentence = licences.of(config(qwen, init_from=str(last)))
    assert front["license"] == "other" and "FCoT's" in sentence
    _, sentence = licences.of(config(qwen, init_from=str(tmp_path / "gone.ckpt")))
    assert "the unknown training data of `gone.ckpt`" in sentence


def test_a_run_above_is_read_as_data(qwen, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    OmegaConf.save(config(qwen, "ChatTraces", data={"licence": "${oc.env:HOME}"}), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"^init_from: .* data\.licence is '\$\{oc\.env:HOME\}'$"):
        licences.of(config(qwen, init_from=str(tmp_path / "checkpoints" / "last.ckpt")))
    OmegaConf.save({"seed": 1}, tmp_path / "config.yaml")
    _, sentence = licences.of(config(qwen, init_from=str(tmp_path / "checkpoints" / "last.ckpt")))
    assert "the unknown training data of `last.ckpt`" in sentence
