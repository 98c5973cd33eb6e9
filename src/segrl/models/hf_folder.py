"""A policy's folder in Hugging Face's format, read whole or refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from segrl.host import digests

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
"""transformers' names of the architectures that can be a policy."""


def family_of(folder: str) -> str:
    """One of `FAMILIES`; raises ValueError if the folder holds another model, or none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"policy.weights: a Hugging Face folder is needed; {folder} has no config.json")
    try:
        family = str(json.loads(path.read_text()).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"policy.weights: a model's config.json is needed; {path} is none ({error})"
        ) from None
    if family not in FAMILIES:
        raise ValueError(f"policy.weights: one of {', '.join(FAMILIES)} is needed; {folder} is a {family}")
    return family


def whole_model(folder: str, dtype: torch.dtype) -> Any:
    """Transformers' model of a folder: what the folder lacks would be noise in it, and no score would say so.

    Raises:
        ValueError: if the weights cannot be read, changed since they were written (`digests`), are not those that config.json describes, or stand beside an adapter.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    if (Path(folder) / "adapter_config.json").exists():  # it would be loaded, and nothing else accounted for
        raise ValueError(
            f"policy.weights: merged weights are needed; {folder} holds an adapter (adapter_config.json)"
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
            f"policy.weights: whole files of weights are needed; those of {folder} cannot be read ({reason})"
        ) from None
    wrong = [
        f"{name} is {tuple(theirs)}, not {tuple(ours)}" for name, theirs, ours in found["mismatched_keys"]
    ]
    wrong += [f"{name} is missing" for name in found["missing_keys"]]
    wrong += [f"{name} is one too many" for name in found["unexpected_keys"] if name.startswith("model.")]
    if wrong:
        raise ValueError(
            f"policy.weights: the weights that config.json describes are needed; {folder} has {len(wrong)} others: {min(wrong)}"
        )
    return model
