"""Look up dotted keys, collect the keys that values refer to, and find circles of references."""

from __future__ import annotations

import re
from typing import Any

REFERENCE = re.compile(r"\$\{([\w.\-\[\]]+)\}")  # a key; resolver calls such as ${now:%Y} do not match
_RELATIVE = re.compile(r"\$\{(\.+)([\w\-][\w.\-\[\]]*)\}")


class Fault(ValueError):
    """An error of one key, in one line.

    Args:
        key: dotted.
        said: the message behind the key.
        unknown: whether the error is that there is no such key.
    """

    def __init__(self, key: str, said: str, unknown: bool = False) -> None:
        super().__init__(f"{key}: {said}")
        self.key, self.said, self.unknown = key, said, unknown


def lookup(node: Any, key: str) -> Any:  # noqa: ANN401 - any value of a configuration
    """Return the value at a dotted key of plain containers.

    Raises:
        KeyError: if the key does not exist.
    """
    for part in re.findall(r"[^.\[\]]+", key):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (TypeError, IndexError, ValueError):
            raise KeyError(key) from None
    return node


def absolute(node: Any, path: tuple[str | int, ...] = ()) -> Any:  # noqa: ANN401 - any value may stand there
    """Return plain containers in which each relative reference names its key from the top.

    As in OmegaConf, `${.key}` stands beside the value, and each further dot is one node up.

    Args:
        node: a configuration as plain containers, or a part of it.
        path: names and places in lists that lead to `node`.
    """
    if isinstance(node, dict):
        return {key: absolute(value, (*path, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [absolute(value, (*path, place)) for place, value in enumerate(node)]
    if not isinstance(node, str):
        return node

    def _from_the_top(match: re.Match[str]) -> str:
        above = path[: max(len(path) - len(match[1]), 0)]
        return f"${{{'.'.join([*map(str, above), match[2]])}}}"

    return _RELATIVE.sub(_from_the_top, node)


def references(node: object) -> set[str]:
    """Return all keys that strings inside a node refer to."""
    if isinstance(node, dict):
        return set().union(*map(references, node.values())) if node else set()
    if isinstance(node, list):
        return set().union(*map(references, node)) if node else set()
    return set(REFERENCE.findall(node)) if isinstance(node, str) else set()


def circle(raw: dict[str, Any]) -> Fault | None:
    """Return a fault that names the keys of one circle of interpolations, or None if there is no circle.

    Args:
        raw: a configuration as plain containers, with unresolved interpolations.
    """
    raw = absolute(raw)
    done: set[str] = set()
    for start in sorted(references(raw)):
        path = _from(raw, start, [], done)
        if path is not None:
            return Fault(path[-1], f"must not refer to itself; it does ({' -> '.join(path)})")
    return None


def _from(raw: dict[str, Any], key: str, path: list[str], done: set[str]) -> list[str] | None:
    """Search depth first for a circle of references that is reachable from `key`.

    Args:
        raw: see `circle`.
        key: where to go on; if it is in `path`, a circle is closed.
        path: keys on the way here.
        done: keys from which no circle is reachable; extended in place.

    Returns:
        The keys of the circle, with the first one repeated at the end; None if there is no circle.
    """
    if key in path:
        return [*path[path.index(key) :], key]
    if key in done:
        return None
    try:
        value = lookup(raw, key)
    except KeyError:  # reported by `walk`
        return None
    for ref in sorted(references(value)):
        found = _from(raw, ref, [*path, key], done)
        if found is not None:
            return found
    done.add(key)
    return None
