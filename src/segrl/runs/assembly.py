"""Build a stage from the flat keys of its node in the configuration.

Users type short keys, such as `stage.group_size=8`; a stage takes objects, such as a `Loop`. Each key of the
node is an argument of the stage's constructor, or a field of a dataclass that the constructor takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf


def composites(made: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters of a constructor that are dataclasses, by name."""
    try:
        hints = get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except (NameError, TypeError):  # annotations that exist for a type checker alone
        return {}
    names = inspect.signature(made).parameters
    return {name: hint for name, hint in hints.items() if name in names and is_dataclass(hint)}


def keys(made: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keys of a part's node, with the parameter that takes each.

    A parameter that is a dataclass is replaced by the parameters of the dataclass's constructor.
    """
    inner, found = composites(made), dict[str, inspect.Parameter]()
    for name, parameter in inspect.signature(made).parameters.items():
        found |= inspect.signature(inner[name]).parameters if name in inner else {name: parameter}
    return found


def stage_of(node: DictConfig) -> Any:  # noqa: ANN401 - Stage, or a user's own class
    """Return the stage that a node of the configuration describes.

    Args:
        node: `_target_`, the class of the stage, and its keys.

    Raises:
        ValueError: if the class does not accept these keys.
    """
    from hydra.utils import get_object, instantiate

    made = get_object(node["_target_"])
    values = {
        str(key): instantiate(value) if OmegaConf.is_config(value) else value
        for key, value in node.items()
        if key != "_target_"
    }
    arguments: dict[str, Any] = {}
    try:
        for name, composite in composites(made).items():
            if name not in values:
                given = [f.name for f in fields(composite) if f.name in values]
                arguments[name] = composite(**{key: values.pop(key) for key in given})
        return made(**arguments, **values)
    except TypeError as error:
        raise ValueError(f"stage: must be a node of keys that {node['_target_']} takes ({error})") from error
