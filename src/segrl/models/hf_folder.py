"""Load a policy's folder in Hugging Face's format; refuse one whose weights are incomplete or do not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from segrl.host import digests

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
"""Values of `model_type` in transformers of the architectures that can be a policy."""


def family_of(folder: str) -> str:
    """Return the folder's family, one of `FAMILIES`.

    Raises:
        ValueError: if the folder holds no model, or one of another architecture.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"policy.weights: must be a Hugging Face folder; {folder} has no config.json")
    try:
        family = str(json.loads(path.read_text()).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"policy.weights: {path} must be a model's configuration; it cannot be read ({error})"
        ) from None
    if family not in FAMILIES:
        raise ValueError(f"policy.weights: must be one of {', '.join(FAMILIES)}; {folder} is a {family}")
    return family


def whole_model(folder: str, dtype: torch.dtype) -> Any:
    """Load the model of a folder with transformers.

    Missing, mismatched and extra weights are refused, because transformers only warns and initialises what it
    lacks at random. Extra weights whose names do not begin with `model.` are ignored.

    Raises:
        ValueError: if the weights cannot be read, have changed since they were written (`digests`), are not
            those that config.json describes, or the folder holds an adapter.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    # With an adapter, transformers would load it and not report missing weights.
    if (Path(folder) / "adapter_config.json").exists():
        raise ValueError(
            f"policy.weights: must be merged weights; {folder} holds an adapter (adapter_config.json)"
        )
    digests.check(Path(folder), "policy.weights")
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, SafetensorError, json.JSONDecodeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"policy.weights: must be whole files of weights; those of {folder} cannot be read ({reason})"
        ) from None
    wrong = [
        f"{name} is {tuple(theirs)}, not {tuple(ours)}" for name, theirs, ours in found["mismatched_keys"]
    ]
    wrong += [f"{name} is missing" for name in found["missing_keys"]]
    wrong += [f"{name} is unexpected" for name in found["unexpected_keys"] if name.startswith("model.")]
    if wrong:
        raise ValueError(
            f"policy.weights: must be the weights that config.json describes; "
            f"{len(wrong)} of {folder} are not: {min(wrong)}"
        )
    return model
