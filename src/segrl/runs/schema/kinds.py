"""Define base models and field types of keys, and put into words what a field must be."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

MOST = 1_000_000_000
"""Upper bound of counts: no run comes near it, so a larger number is a typing error."""


class Part(BaseModel):
    """A node of the configuration: a field per key, with type and range. Other keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Open(Part):
    """A node that accepts more keys; without `_target_`, a reference must read each of them (see `walk`)."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def _rising(pair: list[Any]) -> list[Any]:
    """Return a pair unchanged; raise ValueError if its first value is above its second."""
    if pair[0] > pair[1]:
        raise ValueError("the first is above the second")
    return pair


Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Rising = AfterValidator(_rising)
Tokens = Annotated[int, Field(ge=1, le=131_072)]  # half the longest context of Qwen3-VL
Pixels = Annotated[int, Field(ge=16, le=16_384)]  # a side of an image; below 16 no shape can be seen
Words = Annotated[list[Text], Field(max_length=10_000)]


class slot:  # noqa: N801 - an annotation, written as pydantic's own
    """Annotation of a field that holds a node, or several.

    Args:
        name: place whose parts may stand there: a key of `table.PARTS` or `table.SHAPES`.
        many: "list" or "dict" for a list or dict of nodes; "" for one node.
    """

    def __init__(self, name: str, many: str = "") -> None:
        self.name, self.many = name, many

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept any dict or list; `walk` checks what is inside."""
        return core_schema.no_info_plain_validator_function(_container)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: object) -> dict[str, Any]:
        """Return the schema that `slot_of` reads."""
        return {"slot": self.name, "many": self.many}


def _container(value: object) -> object:
    """Return a dict or list unchanged; raise ValueError for any other value."""
    if not isinstance(value, dict | list):
        raise ValueError("no node")
    return value


@cache
def described(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each field of a model."""
    found: dict[str, dict[str, Any]] = model.model_json_schema(by_alias=True)["properties"]
    return found


def slot_of(schema: dict[str, Any]) -> tuple[str, str, bool] | None:
    """Return a slot's name, its `many`, and whether null is allowed; None for a field that is no slot."""
    branches = schema.get("anyOf", [schema])
    for branch in branches:
        if "slot" in branch:
            return branch["slot"], branch["many"], {"type": "null"} in branches
    return None


def fault(model: type[Part], field: str, value: object) -> str | None:
    """Return "must be ...; got ..." if a value does not fit a field, else None."""
    made, schema = model.model_construct(), described(model)[field]
    if isinstance(value, bool) and not _takes_truth(schema):  # bool is a subclass of int
        return f"must be {needed(schema)}; got {shown(value)}"
    try:
        model.__pydantic_validator__.validate_assignment(made, field, value)
    except ValidationError:
        return f"must be {needed(schema)}; got {shown(value)}"
    return None


def _takes_truth(schema: dict[str, Any]) -> bool:
    """Return whether a schema allows true or false."""
    return any(
        branch.get("type") == "boolean"
        or any(isinstance(one, bool) for one in branch.get("enum", [branch.get("const")]))
        for branch in schema.get("anyOf", [schema])
    )


def shown(value: object) -> str:
    """Return a value as YAML or Python writes it, at most 80 characters long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def needed(schema: dict[str, Any]) -> str:
    """Return in words which values a JSON schema allows."""
    if "description" in schema:
        return str(schema["description"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(needed(branch) for branch in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return ("" if len(values) == 1 else "one of ") + ", ".join(
            value if isinstance(value, str) else shown(value) for value in values
        )
    if "slot" in schema:
        return "a node with its keys" if not schema["many"] else f"a {schema['many']} of nodes"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"a{' whole' if kind == 'integer' else ''} number{_bounds(schema)}"
    if kind == "array":
        return _listed(schema)
    if kind == "object":
        return "names with values"
    return {"boolean": "true or false", "null": "null", "string": "text"}.get(str(kind), "a value")


def _bounds(schema: dict[str, Any]) -> str:
    """Return the bounds of a number in words, such as " from 1 to 9"; "" if there are none."""
    low = f" above {schema['exclusiveMinimum']:.9g}" if "exclusiveMinimum" in schema else ""
    low = f" from {schema['minimum']:.9g}" if "minimum" in schema else low
    high = f" below {schema['exclusiveMaximum']:.9g}" if "exclusiveMaximum" in schema else ""
    return low + (f" to {schema['maximum']:.9g}" if "maximum" in schema else high)


def _listed(schema: dict[str, Any]) -> str:
    """Return in words which lists a JSON schema allows."""
    least, most = schema.get("minItems"), schema.get("maxItems")
    item = needed(schema.get("items", {})).removeprefix("a ")
    if least == most == 2:
        return f"a list of two, the smaller first, each a {item}"
    return f"a list, not empty, of {item}" if least else f"a list of {item}"
