"""The card beside a policy's weights: the grammar, mask head and limits with which it was trained.

A card is untrusted data. It may name segrl's own adapters and give them plain values. It cannot name other
code, or files outside of the package, the folder of weights, and its own folder.
"""

from __future__ import annotations

import importlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from segrl.host import digests
from segrl.host.foreign import strange
from segrl.prompts import instructions

NAME = "segrl.json"
PARTS = {
    "policy": r"segrl\.models\.hf_vlm\.\w+",
    "grammar": r"segrl\.prompts\.\w+\.\w+",
    "head": r"segrl\.models\.sam2_head\.\w+",
    "rollout": r"segrl\.rollout\.\w+\.\w+",
}
_ARCHITECTURE = re.compile(r"asset:[\w.]+|configs/sam2(?:\.1)?/[\w.+]+\.yaml")
_CHECKPOINT = re.compile(r"(?:asset|weights):[\w.-]+")
_DTYPE = re.compile("float32|bfloat16|float16")

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The autocast dtype of each of Lightning's precisions; None: no autocast."""

Card = dict[str, dict[str, Any]]
"""For each part, its class under `_target_` and the arguments of its constructor; the precision of `passes`
under `precision`."""


def write(folder: Path, card: Card) -> None:
    """Write the card beside the weights, and the digests of all files in the folder but README.md."""
    (folder / NAME).write_text(json.dumps(card, indent=2) + "\n")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    digests.write(folder, [name for name in files if name not in ("README.md", digests.NAME)])


def read(folder: Path) -> Card:
    """Return the card of a folder, empty if it has none.

    Raises:
        ValueError: if the card is damaged or names anything but segrl's own parts, or a file has changed
            since its digest was written.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: must be JSON; {error}") from None
    checked(card, path)
    for part in PARTS:
        _adapter(part, card[part])
    beside = folder / instructions.NAME
    if "instructions" not in card["grammar"] and beside.is_file():
        card["grammar"]["instructions"] = instructions.read(beside)
    digests.check(folder, "model")
    return dict(card)


def build(part: str, values: dict[str, Any], weights: Path) -> Any:  # noqa: ANN401 - one of the adapters
    """Construct the object that a part of a card describes.

    Args:
        part: one of `PARTS`.
        values: the card's entry of that part.
        weights: folder of the mask heads' checkpoints.

    Raises:
        ValueError: if the class is not segrl's, or its constructor does not take the values.
    """
    made = _adapter(part, values)
    arguments = {key: located(value, weights) for key, value in values.items() if key != "_target_"}
    try:
        return made(**arguments)
    except TypeError as error:
        raise ValueError(f"{NAME}: {part}: {error}") from None


def _adapter(part: str, values: dict[str, Any]) -> type:
    """Return the class that a part names; raise ValueError unless its module defines that class itself."""
    module, _, name = str(values["_target_"]).rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        made = None
    if not isinstance(made, type) or made.__module__ != module:
        raise ValueError(f"{NAME}: {part}._target_: must be a class of segrl; got {values['_target_']}")
    return made


def located(value: Any, weights: Path | str) -> Any:  # noqa: ANN401 - plain values pass through
    """Return the path for `asset:NAME` or `weights:NAME`, and any other value unchanged."""
    if isinstance(value, str) and value.startswith("asset:"):
        return str(resources.files("segrl") / "assets" / value.removeprefix("asset:"))
    if isinstance(value, str) and value.startswith("weights:"):
        return f"{weights}/{value.removeprefix('weights:')}"
    return value


def checked(card: object, path: Path) -> Card:
    """Return the card; raise ValueError, naming the file, unless it names segrl's own parts only."""
    wanted = [*PARTS, "precision"]
    if not isinstance(card, dict) or set(card) != set(wanted):
        raise ValueError(
            f"{path}: must hold {', '.join(wanted)}; got {sorted(card) if isinstance(card, dict) else card}"
        )
    if not isinstance(card["precision"], dict) or card["precision"].get("passes") not in PRECISIONS:
        raise ValueError(
            f"{path}: precision.passes: must be one of {', '.join(PRECISIONS)}; got {card['precision']!r:.80}"
        )
    for part, pattern in PARTS.items():
        values = card[part]
        if not isinstance(values, dict) or not re.fullmatch(pattern, str(values.get("_target_"))):
            raise ValueError(f"{path}: {part}._target_: must match {pattern}; got {values!r:.80}")
        plain = {key: value for key, value in values.items() if key != "_target_"}
        for key, value in strange(plain, whole=False):
            raise ValueError(
                f"{path}: {part}.{key}: must be plain data, without references (${{...}}) and keys that "
                f"begin with _; got {value!r:.80}"
            )
    for part, key, allowed in (
        ("head", "architecture", _ARCHITECTURE), ("head", "checkpoint", _CHECKPOINT),
        ("policy", "dtype", _DTYPE),
    ):  # fmt: skip
        value = str(card[part].get(key))
        if not allowed.fullmatch(value):
            raise ValueError(f"{path}: {part}.{key}: must match {allowed.pattern}; got {value:.80}")
    if (given := card["grammar"].get("instructions")) is not None:  # must be texts, not a path
        instructions.checked(given, f"{path}: grammar.instructions")
    if card["head"].get("embeddings_folder") is not None:  # a card must not choose where to write
        raise ValueError(
            f"{path}: head.embeddings_folder: must be null; got {card['head']['embeddings_folder']!r:.80}"
        )
    return card
