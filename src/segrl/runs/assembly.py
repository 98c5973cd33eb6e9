"""Build a stage from the flat keys of its node in the configuration.

Users type short keys, such as `stage.group_size=8`; a stage takes objects, such as a `Loop`. Each key of the
node is an argument of the stage's constructor, or a field of a dataclass that the constructor takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf


def _parameters(made: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Return the parameters of a constructor by name, with their annotated types; None for one unknown.

    Where a class passes `**keywords` on, the parameters of its base class count, too.
    """
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    classes = made.__mro__ if inspect.isclass(made) else ()
    for maker in [one.__dict__["__init__"] for one in classes if "__init__" in one.__dict__] or [made]:
        taken = list(inspect.signature(maker).parameters.values())[1 if classes else 0 :]
        for one in taken:
            if one.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                found.setdefault(one.name, (one, _type_of(one, maker)))
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken):
            break
    return found


def _type_of(parameter: inspect.Parameter, maker: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Return the annotated type of a parameter, `T` for `T | None`; None if it cannot be evaluated."""
    stub = SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        hint = get_type_hints(stub, globalns=maker.__globals__)["it"]
    except (NameError, TypeError, AttributeError):  # a name that exists for a type checker alone
        return None
    inner = [one for one in get_args(hint) if one is not type(None)]
    return inner[0] if len(inner) == 1 and type(None) in get_args(hint) else hint


def composites(made: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters of a constructor that are dataclasses, by name."""
    return {name: hint for name, (_, hint) in _parameters(made).items() if is_dataclass(hint)}


def keys(made: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keys of a part's node, with the parameter that takes each.

    A parameter that is a dataclass is replaced by the parameters of the dataclass's constructor.
    """
    found: dict[str, inspect.Parameter] = {}
    for name, (parameter, hint) in _parameters(made).items():
        inner = {} if not is_dataclass(hint) else inspect.signature(cast("type", hint)).parameters
        found |= inner or {name: parameter}
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
    for name, composite in composites(made).items():
        if name not in values:
            given = {f.name: values.pop(f.name) for f in fields(composite) if f.name in values}
            _check(composite, given, node["_target_"])
            arguments[name] = composite(**given)
    _check(made, arguments | values, node["_target_"])
    return made(**arguments, **values)


def _check(made: Callable[..., Any], arguments: dict[str, Any], target: str) -> None:
    """Raise ValueError unless a constructor takes these arguments, and needs no others."""
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"stage: must be a node of keys that {target} takes ({error})") from error
