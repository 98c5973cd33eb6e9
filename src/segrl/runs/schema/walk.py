"""Walk over a configuration, follow its interpolations, and check each key against the field that reads it.

Example: `data.module.batch_size: ${data.batch_size}`. The value stands at `data.batch_size`, so that key must
fit the field `batch_size` of `data.module`, and an error message names `data.batch_size`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, InterpolationToMissingValueError

from segrl.runs.assembly import keys
from segrl.runs.schema.interpolations import REFERENCE, Fault, absolute, circle, lookup, references
from segrl.runs.schema.kinds import Open, Part, Text, described, fault, needed, shown, slot_of
from segrl.runs.schema.table import PARTIAL, PARTS, SHAPES, known

_TRAINERS = {
    "gradient_clip_val": "stage.max_grad_norm clips", "gradient_clip_algorithm": "stage.max_grad_norm clips",
    "accumulate_grad_batches": "stage.micro_batch_size accumulates",
}  # fmt: skip


class ForeignPart(Fault):
    """The fault that a configuration file from elsewhere names a part, `target`, that segrl does not know."""

    def __init__(self, key: str, target: str) -> None:
        super().__init__(
            key, f"must be a part of segrl, because others may have written the file; got {target}"
        )
        self.target = target


class Typed(NamedTuple):
    """A key and the field that its value must fit."""

    key: str
    model: type[Part]
    field: str

    @property
    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the field."""
        return described(self.model)[self.field]


class _Written(Part):
    """The field for a value that is interpolated into a longer string, such as a path."""

    piece: Text | int | float


class Walk:
    """One walk over an unresolved configuration.

    Args:
        raw: the configuration as plain containers, with unresolved interpolations.
        command: model of the top-level keys.
        typed: `_target_` keys that may name a part that is not segrl's; such a part is imported, to compare
            its constructor with the keys. None allows it everywhere.
    """

    def __init__(
        self, raw: dict[str, Any], command: type[Part], typed: Collection[str] | None = None
    ) -> None:
        self.raw, self.command, self.typed = absolute(raw), command, typed
        self.reached: set[str] = set()
        self.referred = references(self.raw)

    def __iter__(self) -> Iterator[Typed | Fault]:
        """Yield each key once per field that it must fit, and a fault for each error of structure."""
        yield from self._fields("", self.raw, self.command)

    def _source(self, path: str, value: Any) -> tuple[str, Any]:  # noqa: ANN401
        """Follow a value `${key}` to the key where its value stands.

        Returns:
            That key and its value; `path` and `value` themselves if the value is no reference.

        Raises:
            Fault: if a referenced key does not exist.
        """
        while isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
            try:
                path, value = match[1], lookup(self.raw, match[1])
            except KeyError:
                raise Fault(
                    path, f"must refer to an existing key; got ${{{match[1]}}}", unknown=True
                ) from None
        return path, value

    def _fields(self, path: str, node: dict[str, Any], model: type[Part]) -> Iterator[Typed | Fault]:
        """Yield what one node holds: its keys, unknown keys and missing keys."""
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
        """Return whether a reference names a key, a key inside it, or a node around it."""
        return any(
            f"{ref}.".startswith(f"{key}.") or f"{key}.".startswith(f"{ref}.") for ref in self.referred
        )

    def _unknown(self, path: str, key: str, model: type[Part], node: dict[str, Any]) -> Fault:
        """Return the fault for a key that a node does not take."""
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
        self,
        here: str,
        value: Any,  # noqa: ANN401
        model: type[Part],
        field: str,
    ) -> Iterator[Typed | Fault]:
        """Yield what one key holds: a value, a node, or several nodes."""
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
            for ref in _pieces(found):
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

    def _included(self, path: str) -> str:
        """Return where the keys of a test set stand that a data group includes, as a way out; else ""."""
        name = path.removeprefix("data.module.test.")
        included = self.raw.get("data", {}).get("testsets", {}) if name != path else {}
        return f" (keys of this test set stand at data.testsets.{name}.samples)" if name in included else ""

    def _piece(self, path: str, ref: str) -> Iterator[Typed | Fault]:
        """Yield a key whose value is interpolated into a longer string."""
        try:
            source, _ = self._source(path, f"${{{ref}}}")
        except Fault as error:
            yield error
            return
        yield Typed(source, _Written, "piece")

    def _one(self, path: str, value: Any, place: str) -> Iterator[Typed | Fault]:  # noqa: ANN401
        """Yield what one of several nodes holds."""
        try:
            source, found = self._source(path, value)
        except Fault as error:
            yield error
            return
        yield from self._node(source, found, place)

    def _node(self, path: str, node: Any, place: str) -> Iterator[Typed | Fault]:  # noqa: ANN401
        """Yield what a node at a place holds, unless it has been reached before."""
        if path in self.reached:
            return
        self.reached.add(path)
        if not isinstance(node, dict):
            yield Fault(path, f"must be a node of the configuration; got {shown(node)} (~{path} removes it)")
        elif place in SHAPES:
            yield from self._fields(path, node, SHAPES[place])
        elif not isinstance(target := node.get("_target_"), str):
            said = "it is not set" if target is None else f"got {shown(target)}"
            yield Fault(f"{path}._target_", f"must name a part; {said}{self._included(path)}")
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
            yield from _own(path, node, target, place)


def _pieces(value: object) -> set[str]:
    """Return the keys that longer strings of a value refer to; `${key}` alone is the value of that key."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return set().union(*map(_pieces, inner))
    return references(value) if isinstance(value, str) and not REFERENCE.fullmatch(value) else set()


def _own(path: str, node: dict[str, Any], target: str, place: str) -> Iterator[Fault]:
    """Check a part that is not segrl's: import it, and compare its parameters with the node's keys.

    Args:
        path: key of the node.
        node: with `_target_` and arguments.
        target: the `_target_`.
        place: of the node.

    Yields:
        A fault if Python cannot find or call the part, and one for each key that it does not take.
    """
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
        parameters = inspect.signature(made).parameters
    except ValueError:  # some builtins have no signature
        return
    if place != "stage" and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    taken = [*parameters, *(keys(made) if place == "stage" else ())]
    for key in node:
        if key not in ("_target_", "_partial_") and key not in taken:
            takes = f" ({name} takes {', '.join(taken)})"
            yield Fault(
                f"{path}.{key}", f"there is no such key{near(str(key), taken, path) or takes}", unknown=True
            )


def near(word: str, words: Any, path: str) -> str:  # noqa: ANN401 - any collection of names
    """Return "; did you mean ...?" if a word resembles one of `words`, else ""."""
    found = difflib.get_close_matches(word, [str(one) for one in words], n=1, cutoff=0.6)
    return f"; did you mean {path + '.' if path else ''}{found[0]}?" if found else ""


def plain(cfg: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """Return a configuration as plain containers, with interpolations unresolved unless `resolve`."""
    return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=resolve))


def faults(cfg: DictConfig, command: type[Part], typed: Collection[str] | None = None) -> list[Fault]:
    """Return a fault for each key that is wrong, in the order of the configuration.

    Args:
        cfg: composed, or read from a file.
        command: model of the top-level keys.
        typed: for a configuration file from elsewhere, the keys that the user sets on the command line: only
            these may name parts that are not segrl's. None trusts the whole configuration.
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
                    path, Fault(f"{path}._target_", "must not be set: segrl builds no part at this key")
                )
    return list(found.values())


def _misfit(cfg: DictConfig, raw: dict[str, Any], one: Typed) -> str | None:
    """Return why a key's value does not fit its field, or None if it fits."""
    if lookup(raw, one.key) == "???":
        return f"must be given ({needed(one.schema)}); it is not set"
    try:
        value = OmegaConf.select(cfg, one.key)
        if isinstance(value, DictConfig | ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
    except InterpolationToMissingValueError:  # reported for the missing key itself
        return None
    except InterpolationResolutionError as error:
        reason = " ".join(str(error).splitlines()[0].split())
        return (
            f"must be {needed(one.schema)}; got {shown(lookup(raw, one.key))}, "
            f"which cannot be resolved ({reason})"
        )
    if isinstance(value, dict | list) and next(_nodes(value), None) is not None:
        return "must hold plain values; a part, with _target_, is referred to in it"
    return fault(one.model, one.field, value)


def _nodes(node: object, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of all nodes that have a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path
        for key, value in node.items():
            yield from _nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _nodes(value, f"{path}[{index}]")
