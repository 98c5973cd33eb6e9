"""A policy's folder is read whole or refused: transformers initialises missing weights at random and only
warns.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from segrl.models.hf_folder import family_of, whole_model

MORE = "model.language_model.layers.99.mlp.down_proj.weight"
NAME = "model.language_model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(nano_weights, tmp_path):
    return shutil.copytree(nano_weights("qwen3_vl"), tmp_path / "policy")


def save(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def narrowed(weights):
    weights[NAME] = weights[NAME][:4].contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(NAME), f"{NAME} is missing"),
        (lambda weights: weights.update({MORE: weights[NAME].clone()}), f"{MORE} is unexpected"),
        (narrowed, rf"{NAME} is \(4, \d+\), not \(\d+, \d+\)"),
    ],
)
def test_weights_that_would_be_noise_are_refused(folder, change, words):
    whole_model(str(folder), torch.float32)
    save(folder, change)
    with pytest.raises(ValueError, match=f"policy.weights: .*{words}"):
        whole_model(str(folder), torch.float32)


def test_a_foreign_head_in_the_file_changes_no_weight_of_the_model(folder):
    before = whole_model(str(folder), torch.float32).state_dict()
    save(folder, lambda weights: weights.update({"v_head.summary.weight": torch.zeros(3)}))
    after = whole_model(str(folder), torch.float32).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_truncated_and_a_missing_file_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"policy\.weights: .* cannot be read"):
        whole_model(str(folder), torch.float32)
    path.unlink()
    with pytest.raises(ValueError, match=r"policy\.weights: .* cannot be read"):
        whole_model(str(folder), torch.float32)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"policy\.weights: .* cannot be read"):
        whole_model(str(folder), torch.float32)


def test_an_adapter_in_the_folder_is_refused(folder):
    """transformers loads it and then does not report missing weights."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"policy\.weights: must be merged weights"):
        whole_model(str(folder), torch.float32)


def test_another_model_is_refused_by_its_name(folder):
    assert family_of(str(folder)) == "qwen3_vl"
    path = folder / "config.json"
    for text, words in (
        (json.dumps({"model_type": "llama"}), "is a llama"),
        ("{", "must be a model's configuration"),
        ("[]", "must be a model's configuration"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"policy.weights: .* {words}"):
            family_of(str(folder))
    path.unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        family_of(str(folder))
