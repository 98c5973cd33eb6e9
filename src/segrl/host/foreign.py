"""Find values in untrusted files that are more than plain data and could call code or read the machine.

The configuration of another person's run and the card beside downloaded weights are data. Their readers
decide which parts of segrl they may name; this module has the rules that both share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_REFERENCES = re.compile(
    r"\$\{(?:instructions_of:\$\{policy\.weights\}|[\w.\-\[\]]+|asset:[\w.\-]+|oc\.select:\w+,[\w.\-]+"
    r"|now:[\w%:.\- ]+)\}"
)
# A `$` that begins another reference, or could begin one after the allowed ones, here \0, are resolved.
_NEW = re.compile(r"\$(?=[{\0]|\Z)")
_HYDRAS = {"_target_", "_partial_"}


def strange(node: object, whole: bool, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted key and value of everything that is not plain data.

    Args:
        node: nested dicts and lists.
        whole: whether it is a whole configuration. That may have `_target_` and `_partial_`, which its reader
            checks, and references to its own keys, `${oc.select:KEY,DEFAULT}`, `${asset:NAME}`,
            `${now:FORMAT}` and `${instructions_of:${policy.weights}}`. If False, there may be no reference
            and no key with `_` in front.
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
