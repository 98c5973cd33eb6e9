"""Every key of a configuration with the part and field that it must fit, found along its interpolations.

`data.module.batch_size: ${data.batch_size}` makes `data.batch_size` a key that must fit
`SegDataModule.batch_size`: a key has the type of what reads it, and a fault names the key that a user writes.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, InterpolationToMissingValueError

from segrl.runs.schema.interpolations import REFERENCE, Fault, circle, lookup, references
from segrl.runs.schema.kinds import Open, Part, Text, described, fault, needed, shown, slot_of
from segrl.runs.schema.table import PARTIAL, PARTS, SHAPES, known

_TRAINERS = {
    "gradient_clip_val": "stage.max_grad_norm clips", "gradient_clip_algorithm": "stage.max_grad_norm clips",
    "accumulate_grad_batches": "stage.micro_batch_size accumulates",
}  # fmt: skip


class ForeignPart(Fault):
    """A file from elsewhere names a part, `target`, that is not segrl's."""

    def __init__(self, key: str, target: str) -> None:
        super().__init__(key, f"must be a part of segrl in a file from elsewhere; got {target}")
        self.target = target


class Typed(NamedTuple):
    """A key, and the field that its value must fit."""

    key: str
    model: type[Part]
    field: str

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the field."""
        return described(self.model)[self.field]


class _Written(Part):
    """What is written into the middle of a path."""

    piece: Text | int | float


class Walk:
    """One walk over an unresolved configuration.

    Args:
        raw: the configuration as plain containers, interpolations as they are written.
        command: keys of the top level.
        typed: keys under which a part that is not segrl's may be named, and is imported to look at its
            constructor; None allows all.
    """

    def __init__(
        self, raw: dict[str, Any], command: type[Part], typed: Collection[str] | None = None
    ) -> None:
        self.raw, self.command, self.typed = raw, command, typed
        self.reached: set[str] = set()
        self.referred = references(raw)

    def __iter__(self) -> Iterator[Typed | Fault]:
        """Yield each key once per field that it must fit, and what is wrong with the structure itself."""
        yield from self._fields("", self.raw, self.command)

    def _source(self, path: str, value: Any) -> tuple[str, Any]:  # noqa: ANN401
        """Return where a value stands that is written as `${key}`, and the value; raises Fault where it does not."""
        while isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
            try:
                path, value = match[1], lookup(self.raw, match[1])
            except KeyError:
                raise Fault(path, f"refers to {match[1]}, which is not there", unknown=True) from None
        return path, value

    def _fields(self, path: str, node: dict[str, Any], model: type[Part]) -> Iterator[Typed | Fault]:
        """The keys of one node."""
        fields = model.model_fields
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key in ("_target_", "_partial_") and path:
                continue
            if key in fields:
                yield from self._field(here, value, model, key)
            elif not issubclass(model, Open):
                yield self._unknown(path, str(key), model, node)
            elif path and "_target_" not in node and not self._read(here):
                others = near(str(key), [k for k in node if k != key], path)
                yield Fault(here, f"there is no such key: nothing reads it{others}", unknown=True)
        for key, field in fields.items():
            if field.is_required() and key not in node:
                here = f"{path}.{key}" if path else key
                yield Fault(here, f"must be given ({needed(described(model)[key])}); it is not set")

    def _read(self, key: str) -> bool:
        """Whether anything refers to a key, to what stands in it, or to the node that it stands in."""
        return any(
            f"{ref}.".startswith(f"{key}.") or f"{key}.".startswith(f"{ref}.") for ref in self.referred
        )

    def _unknown(self, path: str, key: str, model: type[Part], node: dict[str, Any]) -> Fault:
        """A key that a part does not take."""
        here = f"{path}.{key}" if path else key
        if path == "trainer" and key in _TRAINERS:
            return Fault(
                here,
                f"there is no such key: the stage makes its own updates ({_TRAINERS[key]})",
                unknown=True,
            )
        owner = str(node.get("_target_", path or "the configuration")).rpartition(".")[2]
        takes = [name for name in model.model_fields if path]
        near_by = near(key, takes, path) or (f" ({owner} takes {', '.join(takes)})" if takes else "")
        return Fault(here, f"there is no such key{near_by}", unknown=True)

    def _field(
        self, here: str, value: Any, model: type[Part], field: str  # noqa: ANN401
    ) -> Iterator[Typed | Fault]:  # fmt: skip
        """One key: a value, a node, or several nodes."""
        schema = described(model)[field]
        try:
            source, found = self._source(here, value)
        except Fault as error:
            yield error
            return
        place = slot_of(schema)
        if place is None or not isinstance(found, dict | list):
            if found is None and place is not None and place[2]:
                return
            yield Typed(source, model, field)
            for ref in references(found):
                yield from self._piece(source, ref)
            return
        name, many, _ = place
        if not many:
            yield from self._node(source, found, name)
        elif isinstance(found, dict) == (many == "dict"):
            pairs = found.items() if isinstance(found, dict) else enumerate(found)
            for key, one in pairs:
                yield from self._one(f"{source}.{key}" if many == "dict" else f"{source}[{key}]", one, name)
        else:
            yield Fault(
                source, f"must be {'names with nodes' if many == 'dict' else 'a list'}; got {shown(found)}"
            )

    def _piece(self, path: str, ref: str) -> Iterator[Typed | Fault]:
        """A key whose value is written into another string."""
        try:
            source, _ = self._source(path, f"${{{ref}}}")
        except Fault as error:
            yield error
            return
        yield Typed(source, _Written, "piece")

    def _one(self, path: str, value: Any, place: str) -> Iterator[Typed | Fault]:  # noqa: ANN401
        """One of several nodes."""
        try:
            source, found = self._source(path, value)
        except Fault as error:
            yield error
            return
        yield from self._node(source, found, place)

    def _node(self, path: str, node: Any, place: str) -> Iterator[Typed | Fault]:  # noqa: ANN401
        """A node in its place."""
        if path in self.reached:
            return
        self.reached.add(path)
        if not isinstance(node, dict):
            yield Fault(
                path, f"must be a node of the configuration; got {shown(node)} (~{path} takes it away)"
            )
        elif place in SHAPES:
            yield from self._fields(path, node, SHAPES[place])
        elif not isinstance(target := node.get("_target_"), str):
            yield Fault(
                f"{path}._target_",
                f"must name a part; {'it is not set' if target is None else f'got {shown(target)}'}",
            )
        elif (model := known(target, place)) is not None:
            partial = place in PARTIAL or (place == "fn" and not target.endswith(".Quantile"))
            if node.get("_partial_", False) is not partial:
                yield Fault(
                    f"{path}._partial_", f"must be {shown(partial)} here; got {shown(node.get('_partial_'))}"
                )
            yield from self._fields(path, node, model)
        elif self.typed is not None and f"{path}._target_" not in self.typed:
            yield ForeignPart(f"{path}._target_", target)
        elif re.match(r"(segrl|torch|lightning)\.", target):
            names = list(PARTS[place])
            like = near(target, names, "")
            yield Fault(
                f"{path}._target_",
                f"must be one of {', '.join(names)}, or a part of your own; got {target}{like}",
            )
        else:
            yield from _own(path, node, target)


def _own(path: str, node: dict[str, Any], target: str) -> Iterator[Fault]:
    """A part that is not segrl's: it must be there, and take the keys that stand beside its name."""
    from hydra._internal.utils import _locate

    name = target.rpartition(".")[2]
    try:
        made, reason = _locate(target), "it cannot be called"
    except (ImportError, ValueError) as error:
        made, reason = None, " ".join(str(error).split())
    if not callable(made):
        yield Fault(f"{path}._target_", f"must name a part that Python finds; got {target} ({reason})")
        return
    try:
        taken = inspect.signature(made).parameters
    except ValueError:  # of a builtin
        return
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        return
    for key in node:
        if key not in ("_target_", "_partial_") and key not in taken:
            takes = f" ({name} takes {', '.join(taken)})"
            yield Fault(
                f"{path}.{key}", f"there is no such key{near(str(key), taken, path) or takes}", unknown=True
            )


def near(word: str, words: Any, path: str) -> str:  # noqa: ANN401 - any collection of names
    """Return "; did you mean ...?", if anything is near, else ""."""
    found = difflib.get_close_matches(word, [str(one) for one in words], n=1, cutoff=0.6)
    return f"; did you mean {path + '.' if path else ''}{found[0]}?" if found else ""


def plain(cfg: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """Return a configuration as plain containers, with its interpolations as they are written, or resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=resolve))


def faults(cfg: DictConfig, command: type[Part], typed: Collection[str] | None = None) -> list[Fault]:
    """Return all that is wrong with the keys of a configuration, in their order.

    Args:
        cfg: composed, or read from a file.
        command: keys of the top level.
        typed: of a file from elsewhere, the keys that the user has written himself; None trusts all.
    """
    raw = plain(cfg)
    if (looped := circle(raw)) is not None:
        return [looped]
    walk, found = Walk(raw, command, typed), dict[str, Fault]()
    for one in walk:
        if isinstance(one, Fault):
            found.setdefault(one.key, one)
        elif (said := _misfit(cfg, raw, one)) is not None:
            found.setdefault(one.key, Fault(one.key, said))
    if typed is not None:
        for path in _nodes(raw):
            if path not in walk.reached:
                found.setdefault(
                    path, Fault(f"{path}._target_", "must stand where segrl has a place for a part")
                )
    return list(found.values())


def _misfit(cfg: DictConfig, raw: dict[str, Any], one: Typed) -> str | None:
    """Return why a key's value does not fit; None where it fits."""
    if lookup(raw, one.key) == "???":
        return f"must be given ({needed(one.schema)}); it is not set"
    try:
        value = OmegaConf.select(cfg, one.key)
        if isinstance(value, DictConfig | ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
    except InterpolationToMissingValueError:  # told of the key that is missing
        return None
    except InterpolationResolutionError as error:
        reason = " ".join(str(error).splitlines()[0].split())
        return f"must be {needed(one.schema)}; got {shown(lookup(raw, one.key))}, which cannot be looked up ({reason})"
    return fault(one.model, one.field, value)


def _nodes(node: object, path: str = "") -> Iterator[str]:
    """Yield the keys of all nodes that name a part."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path
        for key, value in node.items():
            yield from _nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _nodes(value, f"{path}[{index}]")
