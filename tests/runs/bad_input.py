"""The bad-input table: every key of every experiment with values that its schema refuses, and the line for
each.

80 command lines are written by hand.

    python tests/runs/bad_input.py            # prints key, value, line
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segrl.runs.command import refusal
from segrl.runs.configuration import check_keys, compose_job, conf_folder, experiments, register_resolvers
from segrl.runs.messages import Refused, Said, explain
from segrl.runs.schema.commands import COMMANDS
from segrl.runs.schema.kinds import shown
from segrl.runs.schema.walk import Typed, Walk

NEEDED = {
    "image_mask": ["data.root=x"], "jsonl": ["data.train=x", "data.test=x"],
    "traces": ["data.root=x", "data.traces=x"],
}  # fmt: skip
"""What a data group does not say itself."""

GROUPS = ("stage", "policy", "reference", "head", "grammar", "reward", "rollout", "data", "trainer", "logger")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("[!_]*.yaml"))


def rounds() -> dict[str, tuple[str, list[str]]]:
    """Return configurations that together use every option of every group.

    There are as many as the largest group has options.
    """
    found = {}
    for index in range(max(len(options(group)) for group in GROUPS)):
        chosen = {group: options(group)[index % len(options(group))] for group in GROUPS}
        words = [f"{group}={option}" for group, option in chosen.items()]
        found[f"train {' '.join(words)}"] = ("train", [*words, *NEEDED.get(chosen["data"], [])])
    return found


COMPOSED = {
    **{f"train +experiment={name}": ("train", [f"+experiment={name}"]) for name in experiments()},
    **rounds(),
    **{f"evaluate +suite={name}": ("evaluate", [f"+suite={name}"]) for name in options("suite")},
    **{f"score scores={name}": ("score", [f"scores={name}", "pred=x", "gt=x"]) for name in options("scores")},
    "export": ("export", ["ckpt=x", "out=x"]),
    "prepare check": ("prepare_check", ["data=image_mask", "data.root=x"]),
    "prepare traces": ("prepare_traces", ["data.root=x", "out=x"]),
}  # fmt: skip
"""Every group's options, every experiment, every command."""


@cache
def composed(name: str) -> DictConfig:
    register_resolvers()
    command, arguments = COMPOSED[name]
    return compose_job(command, arguments)


def typed(name: str) -> list[Typed]:
    """Return all keys of a composed configuration, each with the field that it must fit."""
    raw = OmegaConf.to_container(composed(name), resolve=False)
    found = list(Walk(raw, COMMANDS[COMPOSED[name][0]]))
    assert all(isinstance(one, Typed) for one in found), found
    return found


def takes(schema: dict[str, Any], value: object) -> bool:
    """Return whether a JSON schema allows a value.

    This is the test's own reading of the schema, independent of pydantic.
    """
    if "anyOf" in schema:
        return any(takes(branch, value) for branch in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return any(
            type(value) is type(one) and value == one for one in schema.get("enum", [schema.get("const")])
        )
    kind = schema.get("type")
    if kind in ("integer", "number"):
        if (
            isinstance(value, bool)
            or not isinstance(value, int if kind == "integer" else int | float)
            or not math.isfinite(value)
        ):
            return False
        return (
            schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
            and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
        )  # fmt: skip
    if kind == "array":
        if not isinstance(value, list) or not schema.get("minItems", 0) <= len(value) <= schema.get(
            "maxItems", math.inf
        ):
            return False
        return all(takes(schema.get("items", {}), one) for one in value) and (
            "smaller first" not in schema.get("description", "") or value == sorted(value)
        )
    if kind == "object":
        return isinstance(value, dict) and len(value) >= schema.get("minProperties", 0)
    if kind == "string":
        return isinstance(value, str) and len(value) >= schema.get("minLength", 0)
    return {"boolean": isinstance(value, bool), "null": value is None}.get(
        str(kind), isinstance(value, dict | list)
    )


def edges(schema: dict[str, Any]) -> Iterator[object]:
    """Return the values at the bounds of a schema, and next to them."""
    for branch in schema.get("anyOf", [schema]):
        if branch.get("type") not in ("integer", "number"):
            continue
        step = 1 if branch["type"] == "integer" else 1e-9
        for key, away in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
            if key in branch:
                bound = branch[key] if branch["type"] == "number" else int(branch[key])
                yield from (bound, bound + away * max(step, abs(bound) * step))


def bad_values(schema: dict[str, Any]) -> list[object]:
    """Return values that the schema refuses: other types, both sides of the range, non-numbers, null."""
    others: list[object] = [
        "four",
        "",
        True,
        3,
        -1,
        0.5,
        1e300,
        math.nan,
        math.inf,
        -math.inf,
        None,
        {"a": 1},
        [],
        ["four"],
        [[1]],
        [3, 2],
    ]
    return [value for value in (*edges(schema), *others) if not takes(schema, value)]


def good_values(schema: dict[str, Any]) -> list[object]:
    """Return the bounds themselves, where a schema allows them."""
    return [value for value in edges(schema) if takes(schema, value)]


def said_of(name: str, changes: dict[str, object]) -> dict[str, str]:
    """Return, by key, the line that the check prints of a composed configuration with these values."""
    cfg = composed(name).copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    try:
        check_keys(cfg, COMPOSED[name][0])
    except Refused as refused:
        lines = {}
        for one in refused.faults:
            (lines[one.key],) = explain(Refused([one]), Said([f"{one.key}=..."], []), list) or [""]
        return lines
    return {}


def is_told(key: str, value: object, line: str) -> bool:
    """Return whether a line names the key, says what must be, and shows what came."""
    return line.startswith(f"{key}: must be ") and line.endswith(f"; got {shown(value)}") and "\n" not in line


def _told(name: str, left: dict[str, list[object]]) -> Iterator[tuple[str, object, str]]:
    """Yield key, value, line.

    One round changes as many keys at once as do not contain each other.
    """
    while left:
        now: dict[str, object] = {}
        for key in list(left):
            if not any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in now):
                now[key] = left[key].pop()
                if not left[key]:
                    del left[key]
        lines = said_of(name, now)
        for key, value in now.items():
            if not is_told(key, value, lines.get(key, "")):  # another of these values may have hidden it
                lines |= {key: "TAKEN"} | said_of(name, {key: value})
            yield key, value, lines[key]


def values() -> Iterator[tuple[str, Typed, object]]:
    """Yield the name of a composed configuration, key and field, and a refused value.

    Each key and field comes once.
    """
    seen = set()
    for name in COMPOSED:
        for one in typed(name):
            if one not in seen:
                seen.add(one)
                yield from ((name, one, value) for value in bad_values(one.schema))


def table() -> Iterator[tuple[str, object, str]]:
    """Yield key, value, and line of the check, for all values of all keys."""
    left: dict[str, dict[str, list[object]]] = {}
    for name, one, value in values():
        left.setdefault(name, {}).setdefault(one.key, []).append(value)
    for name, wanted in left.items():
        yield from _told(name, wanted)


def main() -> None:
    """Print the table."""
    from by_hand import BY_HAND

    count = 0
    for key, value, line in table():
        print(f"{key}\t{value!r}\t{line}")
        count += 1
    for command, arguments, _ in BY_HAND:
        print(f"{command} {' '.join(arguments)}\t\t{' / '.join(refusal(command, arguments) or ['TAKEN'])}")
    print(f"{count} values of keys, {len(BY_HAND)} command lines", file=sys.stderr)


if __name__ == "__main__":
    main()
