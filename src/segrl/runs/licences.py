"""Determine the licence of trained weights from the known licences of their base model and data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segrl.runs.resuming import read
from segrl.tracking.run_folder import RunFolder

_OWN = "SyntheticScenes"  # drawn by segrl, so they add no terms
_HUB = "https://huggingface.co/"
_TEXTS = {"apache-2.0": r"Apache License\s+Version 2\.0", "mit": r"MIT License"}


def of(config: DictConfig) -> tuple[dict[str, Any], str]:
    """Return the licence entries of a model card's front matter, and a sentence that explains them.

    If the base model's folder states its licence and all training data was drawn by segrl, that licence is
    used and the sentence is empty. Otherwise the licence is `other`, and the sentence names the terms of base
    model and data, or says that they are not stated.

    Args:
        config: saved configuration of the run.

    Raises:
        ValueError: if the config.yaml of an earlier run that it started from is damaged, or holds more than
            plain values.
    """
    base, weights = base_of(config)
    front: dict[str, Any] = {} if base is None else {"base_model": base}
    named = stated(weights)
    data = learned_from(config)
    if named and not data:
        return front | named, ""
    under = named.get("license_name") or named.get("license")
    terms = "with no licence stated beside its weights" if under is None else f"under {under}"
    also = " and ".join(data) if data else "scenes drawn by segrl"
    sentence = (
        f"Licence: these weights come from {base or weights.name}, {terms}, and from {also}. "
        "The terms of all of them hold; segrl adds none of its own."
    )
    return front | {"license": "other"}, sentence


def base_of(config: DictConfig) -> tuple[str | None, Path]:
    """Return the Hugging Face name of the policy's weights, None if it is unknown, and their folder."""
    weights = Path(str(config.policy.weights))
    source = str(OmegaConf.select(config, "sources", default={}).get("policy.weights", ""))
    hub = source.startswith(_HUB) and source.rpartition("/")[2] == weights.name
    return source.removeprefix(_HUB) if hub else None, weights


def stated(weights: Path) -> dict[str, Any]:
    """Return `license`, `license_name` and `license_link` of a weights folder, as far as they are stated.

    They are read from the front matter of its README.md; if that has no `license`, the text of its LICENSE is
    recognised. Without a licence, returns {}.
    """
    card = weights / "README.md"
    head = (
        re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
    )
    found: dict[str, Any] = {}
    if head is not None:
        for line in head[1].splitlines():
            key, _, value = line.partition(":")
            if key in ("license", "license_name", "license_link") and value.strip():
                found[key] = value.strip().strip("'\"")
    text = weights / "LICENSE"
    if "license" not in found and text.is_file():
        said = text.read_text(errors="replace")[:2000]
        for name, words in _TEXTS.items():
            if re.search(words, said):
                found["license"] = name
    return found if "license" in found else {}


def learned_from(config: DictConfig) -> list[str]:
    """Return the training data, with its licence, of a run and of those it started from.

    Scenes drawn by segrl are left out. Data of a run whose config.yaml is missing is listed as not known.
    """
    found: list[str] = []
    seen: set[Path] = set()
    here: DictConfig | None = config
    while here is not None:
        loader = str(OmegaConf.select(here, "data.module.train._target_")).rpartition(".")[2]
        if loader != _OWN:
            # unresolved: a root in `paths.data` stays a reference
            root = OmegaConf.to_container(here.data).get("root", loader)  # type: ignore[union-attr]
            licence = OmegaConf.select(here, "data.licence")
            found.append(f"data of `{root}` ({licence or 'licence not stated'})")
        start = OmegaConf.select(here, "init_from")
        here = None
        if start is not None:
            saved = RunFolder.of_checkpoint(Path(str(start))).config
            if saved.is_file() and saved not in seen:
                here = read(saved, "init_from")
            seen.add(saved)
            if here is None or OmegaConf.select(here, "data.module.train._target_") is None:
                found.append(f"the unknown training data of `{Path(str(start)).name}`")
                here = None
    return found
