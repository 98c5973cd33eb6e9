"""What a file from elsewhere may hold: plain values and references to its own keys; nothing that is called.

The configuration of a run that somebody else made, and the card beside his weights, are data. Which parts of
segrl they may name is for their readers; here is what both have in common.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_REFERENCES = re.compile(
    r"\$\{(?:instructions_of:\$\{policy\.weights\}|[\w.\-\[\]]+|asset:[\w.\-]+|oc\.select:\w+,[\w.\-]+"
    r"|now:[\w%:.\- ]+)\}"
)
_NEW = re.compile(r"\$(?=[{\0]|\Z)")  # that could begin a reference once others, marked, are put in
_HYDRAS = {"_target_", "_partial_"}


def strange(node: object, whole: bool, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield key and value of all that is more than data.

    Args:
        node: plain containers.
        whole: whether it is a whole configuration, which may name parts (its reader says which) and refer to
            its own keys, `${oc.select:KEY,DEFAULT}`, `${asset:NAME}` and `${now:FORMAT}`; no other resolver
            ever may stand in a string.
        path: dotted key of the node.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if str(key).startswith("_") and not (whole and key in _HYDRAS):
                yield here, value
            yield from strange(value, whole, here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from strange(value, whole, f"{path}[{index}]")
    elif isinstance(node, str):
        if _NEW.search(_REFERENCES.sub("\0", node) if whole else node):
            yield path, node
    elif not isinstance(node, bool | int | float | None):
        yield path, node
