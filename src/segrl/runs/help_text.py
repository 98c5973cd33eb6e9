"""Text of `--help`: the head comment of a command's YAML, its own keys, and the groups that it reads."""

from __future__ import annotations

import re
from pathlib import Path

_KEY = re.compile(r"(\s{0,2})([\w]+):\s*([^#]*?)\s*#\s(.*)")
_GROUP = re.compile(r"\s+- (?:override )?/?([\w]+)(?:: ?(\S+))?")
_USED = {
    "train": [
        "experiment", "adapter", "stage", "policy", "reference", "head", "grammar", "reward", "rollout",
        "data", "trainer", "logger",
    ],
    "evaluate": [
        "suite", "testset", "experiment", "adapter", "policy", "head", "grammar", "rollout", "data", "scores",
        "trainer", "logger",
    ],
    "score": ["scores"], "prepare_check": ["data", "testset"], "prepare_traces": ["data", "grammar", "head"],
}  # fmt: skip
"""Groups that a command reads. Other groups of its defaults only hold keys that these refer to."""


def help_of(name: str, conf: Path) -> str:
    """Return the help of a command.

    Args:
        name: name of its YAML, without suffix.
        conf: configuration folder.
    """
    lines = (conf / f"{name}.yaml").read_text().splitlines()
    head = [line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#")]
    parts = ["\n".join(head)]
    if keys := _keys(lines):
        width = max(len(key) for key, _ in keys)
        parts.append("Keys of this command:\n" + "\n".join(f"  {key:<{width}}  {said}" for key, said in keys))
    if used := _USED.get(name):
        told, defaults = [], _groups(lines, conf)
        for group in used:
            chosen = defaults.get(group, "")
            options = sorted(path.stem for path in (conf / group).glob("[!_]*.yaml"))
            write = (
                f"+{group}="
                if group in ("experiment", "adapter", "suite") or group == "testset" and name == "evaluate"
                else f"{group}="
            )
            default = f" (default {chosen})" if chosen not in ("", "null", "default") else ""
            told.append(f"  {group}: {write}{'|'.join(options)}{default}")
        parts.append("Groups (conf/GROUP/OPTION.yaml holds their keys):\n" + "\n".join(told))
    parts.append("--cfg job prints the whole configuration; SEGRL_TRACE=1 shows the traceback of a refusal.")
    return "\n\n".join(parts)


def _keys(lines: list[str]) -> list[tuple[str, str]]:
    """Return the commented keys of a YAML, as `key=value`, each with its comment."""
    found, above = [], ""
    for line in lines:
        if line.startswith("hydra:"):
            break
        if line.startswith(("#", "defaults:", "  -")):
            continue
        if opened := re.match(r"(\w+):\s*(?:#.*)?$", line):
            above = f"{opened[1]}."
        if match := _KEY.match(line):
            value = match[3] or "..."
            found.append(
                (f"{above if match[1] else ''}{match[2]}={value.replace('???', '(required)')}", match[4])
            )
    return [(key.removesuffix("=..."), said) for key, said in found]


def _groups(lines: list[str], conf: Path) -> dict[str, str]:
    """Return the groups of a defaults list, including lists that it includes, and their chosen options."""
    found: dict[str, str] = {}
    inside = False
    for line in lines:
        inside = line.startswith("defaults:") or (inside and line.startswith("  "))
        if not inside or "hydra/" in line:
            continue
        if match := _GROUP.match(line):
            if match[2] is None and (conf / f"{match[1]}.yaml").is_file():
                found |= _groups((conf / f"{match[1]}.yaml").read_text().splitlines(), conf)
            elif (conf / match[1]).is_dir() and match[1] not in ("paths", "testset"):
                found[match[1]] = match[2] or ""
    return found
