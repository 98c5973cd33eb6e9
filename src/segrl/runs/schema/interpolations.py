"""Look up dotted keys, find what values refer to, and refuse circles: `a: ${b}` beside `b: ${a}`."""

from __future__ import annotations

import re
from typing import Any

REFERENCE = re.compile(r"\$\{([\w.\-\[\]]+)\}")  # one to a key


class Fault(ValueError):
    """What is wrong with one key: `key` and `said`, in one line."""

    def __init__(self, key: str, said: str, unknown: bool = False) -> None:
        super().__init__(f"{key}: {said}")
        self.key, self.said, self.unknown = key, said, unknown


def lookup(node: Any, key: str) -> Any:  # noqa: ANN401 - any value of a configuration
    """Return the value under a dotted key of plain containers; raises KeyError where there is none."""
    for part in re.findall(r"[^.\[\]]+", key):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (TypeError, IndexError, ValueError):
            raise KeyError(key) from None
    return node


def references(node: object) -> set[str]:
    """Return all keys that the strings of a node refer to."""
    if isinstance(node, dict):
        return set().union(*map(references, node.values())) if node else set()
    if isinstance(node, list):
        return set().union(*map(references, node)) if node else set()
    return set(REFERENCE.findall(node)) if isinstance(node, str) else set()


def circle(raw: dict[str, Any]) -> Fault | None:
    """Return a fault that names the keys of one circle of interpolations; None where there is none.

    Args:
        raw: a configuration as plain containers, interpolations as they are written.
    """
    done: set[str] = set()
    for start in sorted(references(raw)):
        path = _from(raw, start, [], done)
        if path is not None:
            return Fault(path[-1], f"must not refer to itself; it does ({' -> '.join(path)})")
    return None


def _from(raw: dict[str, Any], key: str, path: list[str], done: set[str]) -> list[str] | None:
    """Return the keys of a circle that is entered from `key`, the first one at both ends; None where there is none.

    Args:
        raw: see `circle`.
        key: may be one of `path`, and then closes a circle.
        path: keys that lead here.
        done: keys that lead into no circle; those found are added.
    """
    if key in path:
        return [*path[path.index(key) :], key]
    if key in done:
        return None
    try:
        value = lookup(raw, key)
    except KeyError:  # told by the walk over all keys
        return None
    for ref in sorted(references(value)):
        found = _from(raw, ref, [*path, key], done)
        if found is not None:
            return found
    done.add(key)
    return None
