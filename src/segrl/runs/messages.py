"""Turn a user's mistake into a line that names the key, what it must be, and the way out."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segrl.runs.schema.interpolations import Fault

_HERE = Path(__file__).resolve().parents[1]


class Missing(ValueError):
    """Error for missing files and folders; each line has the key and the way to get one."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines[0] if len(lines) == 1 else f"{len(lines)} files or folders are missing")
        self.lines = lines


class Refused(ValueError):
    """Error that holds all faults of the keys of a configuration."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(str(faults[0]))
        self.faults = faults


class Said:
    """The command line, as error messages refer to it.

    Args:
        arguments: arguments of the command line.
        folders: configuration folders with groups of options, segrl's own first.
    """

    def __init__(self, arguments: list[str], folders: list[Path]) -> None:
        self.arguments, self.folders = arguments, folders

    @property
    def keys(self) -> set[str]:
        """Keys and groups that the command line sets or deletes, without `+`, `++` and `~`."""
        return {
            argument.lstrip("+~").split("=")[0] for argument in self.arguments if not argument.startswith("-")
        }

    @property
    def choices(self) -> dict[str, str]:
        """Chosen option by group."""
        pairs = [argument.lstrip("+").split("=", 1) for argument in self.arguments if "=" in argument]
        return {key: value for key, value in pairs if any((folder / key).is_dir() for folder in self.folders)}

    def options(self, group: str) -> list[str]:
        """Return the names of all options of a group, sorted."""
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("[!_]*.yaml")})

    def set_by_experiment(self, key: str) -> str | None:
        """Return the key, or the nearest node around it, that the experiment sets; None if it sets none."""
        name = self.choices.get("experiment")
        if name is None:
            return None
        config = self._set_in("experiment", name)
        parts = key.split(".")
        for length in range(len(parts), 1, -1):
            above = ".".join(parts[:length])
            if above in config:
                return above
        return key if key in config else None

    def _set_in(self, group: str, name: str) -> set[str]:
        """Return all dotted keys that an experiment or an adapter sets, including those in its defaults."""
        for folder in self.folders:
            path = folder / group / f"{name}.yaml"
            if path.is_file():
                loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
                assert isinstance(loaded, dict)
                own = set(_flat({key: value for key, value in loaded.items() if key != "defaults"}, ""))
                for base in loaded.get("defaults", []):
                    if isinstance(base, str) and base != "_self_":
                        own |= self._set_in(group, base)
                    elif isinstance(base, dict) and "/adapter" in base:
                        own |= self._set_in("adapter", base["/adapter"])
                return own
        return set()


def explain(error: BaseException, said: Said, keys: Callable[[], list[str]]) -> list[str] | None:
    """Return the lines for a user's mistake, or None if the error is not known to be one.

    Args:
        error: the exception.
        said: the command line.
        keys: function that returns all dotted keys of the configuration without the user's values.
    """
    from hydra.errors import HydraException, InstantiationException

    cause = error
    while isinstance(cause, HydraException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, Missing):
        many = [f"{len(cause.lines)} files or folders are missing; a line for each says how to get it"]
        return cause.lines if len(cause.lines) == 1 else [*many, *(f"  {line}" for line in cause.lines)]
    if isinstance(cause, Refused):
        return [_refused(cause.faults, said)]
    if type(cause).__name__ == "MisconfigurationException":  # Lightning's, for impossible settings
        return [f"trainer: {' '.join(str(cause).split())}"]
    told = _unbound(str(error), cause) if isinstance(error, InstantiationException) else None
    if told is not None:
        return told
    if isinstance(cause, HydraException | OmegaConfBaseException):
        return [_composition(str(cause), said, keys)]
    if isinstance(cause, ValueError) and _raised_in(cause) == "hydra":
        return [_composition(str(cause), said, keys)]
    if isinstance(cause, OSError):
        if cause.errno == errno.ENOSPC:
            key, what = ("out", "the output") if "out" in keys() else ("paths.runs", "the run")
            return [
                f"{key}: no space is left to write {cause.filename or what}; what was saved before is intact"
            ]
        return None if cause.filename is None else [f"{cause.filename}: {str(cause.strerror).lower()}"]
    if isinstance(cause, ValueError) and _raised_in(cause) == "segrl":
        return [" ".join(str(cause).split())]
    if isinstance(cause, ValueError) and str(cause).startswith("Caught ValueError in DataLoader worker"):
        return [" ".join(str(cause).strip().splitlines()[-1].removeprefix("ValueError: ").split())]
    return None


def _raised_in(error: BaseException) -> str:
    """Return the top-level package that raised an error, or "" if there is no traceback.

    Only ValueErrors of segrl and Hydra are messages for the user; those of other libraries are bugs.
    """
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return ""
    # by file, because the module of a command is called __main__
    if Path(at.tb_frame.f_code.co_filename).resolve().is_relative_to(_HERE):
        return "segrl"
    return str(at.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _refused(faults: list[Fault], said: Said) -> str:
    """Return the message for the first fault of a key that the user sets or, if none is, the first fault.

    If the user has replaced a group that the experiment sets keys of, the message names the conflict.
    """
    first = next((one for one in faults if one.key in said.keys), faults[0])
    sets, name = said.set_by_experiment(first.key), said.choices.get("experiment")
    replaced = [
        f"{'+' if group == 'adapter' else ''}{group}={option}"
        for group, option in said.choices.items()
        if group not in ("experiment", "suite", "testset")
    ]
    if first.key in said.keys or not replaced:
        return f"{first}{_beside(name, replaced)}" if first.key in said.choices else str(first)
    if sets is None:
        return f"{first}{_beside(name, replaced)}"
    guilty = [one for one in replaced if one.lstrip("+").split("=")[0] == sets.split(".")[0]] or replaced
    ways = [
        found
        for one in faults
        if (found := said.set_by_experiment(one.key)) is not None and one.key not in said.keys
    ]
    those = " ".join(guilty)
    if first.unknown or first.key != sets:
        out = " ".join(f"'~{way}'" for way in dict.fromkeys(ways))
        return (
            f"{first}: experiment={name} sets {sets}, which does not fit {those}; "
            f"add {out} to the command line"
        )
    return (
        f"{first} (experiment={name} sets it, which does not fit {those}; "
        f"add {first.key}=... to the command line)"
    )


def _beside(experiment: str | None, replaced: list[str]) -> str:
    """Return the experiment and the replaced groups in parentheses, to follow a fault that they cause."""
    return f" ({' '.join([f'experiment={experiment}'] * bool(experiment) + replaced)})"


def _unbound(message: str, cause: BaseException) -> list[str] | None:
    """Return the line for a constructor that cannot be called, or None if it raised an error itself."""
    where = re.search(r"full_key: (\S+)", message)
    node = where.group(1) if where else "the configuration"
    if (
        not isinstance(cause, TypeError | ImportError | AttributeError)
        and "Error locating target" not in message
    ):
        return None
    if what := re.search(r"unexpected keyword argument '(\w+)'", str(cause)):
        return [f"{node}.{what.group(1)}: there is no such key: the constructor does not take it"]
    first = (
        " ".join(message.splitlines()[0].split())
        .removesuffix(":")
        .replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "")
    )
    reason = " ".join(str(cause).split())
    return [
        f"{node}: {first}"
        + (
            f" ({reason[:300]})"
            if reason and reason not in first and not reason.startswith(first[:40])
            else ""
        )
    ]


def _composition(message: str, said: Said, keys: Callable[[], list[str]]) -> str:
    """Return the line for an error of Hydra or OmegaConf, with the nearest existing key or option."""
    if missing := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{missing.group(1)}: must be given; it is not set"
    if unknown := (
        re.search(r"Could not override '([^']+)'", message)
        or re.search(r"Could not delete from config\. '([^']+)'", message)
        or re.search(r"Key '(\S+)' is not in struct", message)
    ):
        key = unknown.group(1)
        if full := re.search(r"full_key: (\S+)", message):
            key = full.group(1)
        return _no_key(key, said, keys())
    if twice := re.search(r"Multiple values for (\S+)\. To override", message):
        return (
            f"{twice.group(1)}: must be written without +, because the defaults list has it: "
            f"{twice.group(1)}=NAME"
        )
    if again := re.search(r"(\w+) appears more than once in the final defaults list", message):
        group = again.group(1)
        return (
            f"{group}: must be chosen once; experiment={said.choices.get('experiment')} chooses it already "
            f"(leave +{group}={said.choices.get(group)} out)"
        )
    if option := re.search(r"(?:Could not find|In '[^']+': Could not find) '([^']+)'", message):
        group, _, name = option.group(1).rpartition("/")
        options = said.options(group)
        near = _nearest(name, options)
        return f"{group}={name}: there is no such option{near} (there are: {', '.join(options)})"
    if "group override must be a string" in message:
        group = next((key for key, value in said.choices.items() if value in ("null", "")), "a group")
        there = ", ".join(said.options(group))
        return f"{group}: must name an option, one of {there}; got null (~{group}.KEY removes a key of it)"
    if mismatch := re.search(r"(?s)(.*)full_key: (\S+)", message):
        return f"{mismatch.group(2)}: {' '.join(mismatch.group(1).split()).rstrip(':')}"
    return " ".join(message.split()).rstrip(":")


def _no_key(key: str, said: Said, keys: list[str]) -> str:
    """Return the line for an unknown key, with the way to write it or the nearest existing key."""
    if key in ("experiment", "adapter", "suite", "testset"):
        return f"{key}: must be written with +, because the defaults list lacks it: +{key}=NAME"
    for argument in said.arguments:
        above, _, value = argument.partition("=")
        if value.startswith("{") and key.startswith(f"{above}."):
            return (
                f"{key}: there is no such key in {above}, and {{...}} is merged into the present node; "
                f"to replace the node write '~{above}' '+{argument}'"
            )
    return f"{key}: there is no such key{_nearest_key(key, keys)}"


def _nearest_key(key: str, keys: list[str]) -> str:
    """Return `; did you mean ...?` with the most similar key, or "" if none is similar.

    The similarity of the last parts weighs more than that of the whole keys.
    """

    def _likeness(other: str) -> float:
        last, whole = (
            difflib.SequenceMatcher(None, a, b).ratio()
            for a, b in ((key.rpartition(".")[2], other.rpartition(".")[2]), (key, other))
        )
        return last + 0.5 * whole if last >= 0.6 else whole * 0.8

    best = max(keys, key=_likeness, default="")
    return f"; did you mean {best}?" if best and _likeness(best) >= 0.55 else ""


def _nearest(word: str, words: list[str]) -> str:
    """Return `; did you mean ...?` with the most similar word, or "" if none is similar."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def dotted(config: DictConfig) -> list[str]:
    """Return all dotted keys of a configuration."""
    return list(_flat(OmegaConf.to_container(config, resolve=False), ""))


def _flat(node: Any, prefix: str) -> Iterator[str]:  # noqa: ANN401 - any value of a configuration
    """Yield the dotted keys of a nested mapping, also those of inner nodes."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _flat(value, f"{prefix}{key}.")
