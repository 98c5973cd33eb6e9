"""A policy's folder in Hugging Face's format, read whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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
    """Transformers' model of a folder; what the folder lacks would be noise in it, and no score would say so.

    Raises:
        ValueError: if the weights cannot be read, or one is missing or of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"policy.weights: whole safetensors files are needed; those of {folder} cannot be read ({error})"
        ) from None
    for name, theirs, ours in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"policy.weights: the weights that config.json describes are needed; in {folder} {name} is {tuple(theirs)}, not {tuple(ours)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"policy.weights: all weights of the model are needed; {folder} lacks {len(missing)}, such as {missing[0]}"
        )
    return model
