"""Under which terms trained weights may be given on: those of base model and data, as far as they are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segrl.runs.resuming import read

_OWN = "SyntheticScenes"  # drawn by segrl: they have no terms of their own
_HUB = "https://huggingface.co/"
_TEXTS = {"apache-2.0": r"Apache License\s+Version 2\.0", "mit": r"MIT License"}


def of(config: DictConfig) -> tuple[dict[str, Any], str]:
    """Return what a card's head says of base model and licence, and the sentence that explains it.

    The base model's licence is the card's where its folder states it and all that was learned from was drawn by
    segrl; else it is `other`, and the sentence names the terms of both, or says that they are not stated.

    Args:
        config: of the run, as it was saved.

    Raises:
        ValueError: if the configuration of a run that it started from is none, or more than data.
    """
    base, weights = base_of(config)
    front: dict[str, Any] = {} if base is None else {"base_model": base}
    named = stated(weights)
    data = learned_from(config)
    if named and not data:
        return front | named, ""
    under = named.get("license_name") or named.get("license")
    terms = "whose licence is not stated beside its weights" if under is None else f"under {under}"
    also = " and ".join(data) if data else "scenes drawn by segrl"
    sentence = (
        f"Licence: these weights come from {base or weights.name}, {terms}, and from {also}. "
        "The terms of all of them hold; segrl states none of its own."
    )
    return front | {"license": "other"}, sentence


def base_of(config: DictConfig) -> tuple[str | None, Path]:
    """Return the name on the hub of the policy's weights, None where they are from elsewhere, and their folder."""
    weights = Path(str(config.policy.weights))
    source = str(OmegaConf.select(config, "sources", default={}).get("policy.weights", ""))
    hub = source.startswith(_HUB) and source.rpartition("/")[2] == weights.name
    return source.removeprefix(_HUB) if hub else None, weights


def stated(weights: Path) -> dict[str, Any]:
    """Return `license`, and its name and link if given, of a weights folder: from its card, or its LICENSE."""
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
    """Return the data, with its terms, that this run and those it started from saw, but for segrl's own scenes."""
    found: list[str] = []
    seen: set[Path] = set()
    here: DictConfig | None = config
    while here is not None:
        loader = str(OmegaConf.select(here, "data.module.train._target_")).rpartition(".")[2]
        if loader != _OWN:
            root = OmegaConf.to_container(here.data).get("root", loader)  # type: ignore[union-attr]  # unresolved
            licence = OmegaConf.select(here, "data.licence")
            found.append(f"data of `{root}` ({licence or 'whose licence is not stated'})")
        start = OmegaConf.select(here, "init_from")
        here = None
        if start is not None:
            saved = Path(str(start)).absolute().parent.parent / "config.yaml"
            if saved.is_file() and saved not in seen:
                here = read(saved, "init_from")
            seen.add(saved)
            if here is None or OmegaConf.select(here, "data.module.train._target_") is None:
                found.append(f"whatever `{Path(str(start)).name}` learned from, which is not known")
                here = None
    return found
