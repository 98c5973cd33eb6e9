"""Compose configurations, register their resolvers, and check them. Nothing heavy is imported here."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segrl.prompts.instructions import NAME as INSTRUCTIONS
from segrl.prompts.instructions import read as read_instructions
from segrl.runs.messages import Missing, Refused, Said

_HERE = Path(__file__).resolve().parents[1]
_VALUE = re.compile(r"(\+{0,2}[\w.]+)=([\w.+-]+)")
_SEARCH = "hydra.searchpath="


def conf_folder() -> Path:
    """Return the folder `conf` of the checkout, or its copy in the installed wheel."""
    for folder in (_HERE.parent.parent / "conf", _HERE / "_conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"segrl is installed without its configuration: neither {_HERE / '_conf'} nor ../conf exists"
    )


def experiments() -> list[str]:
    """Return the names of all experiments."""
    return sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml"))


def asset(name: str) -> str:
    """Return the path of a file or folder that ships with the package."""
    return str(_HERE / "assets" / name)


def instructions_of(weights: object) -> str | None:
    """Return the path of the instructions file in a folder of weights, or None if there is none.

    If `weights` is not a non-empty string, returns None: the check of `policy.weights` rejects such a value.
    """
    if not isinstance(weights, str) or not weights:
        return None
    beside = Path(weights) / INSTRUCTIONS
    return str(beside) if beside.is_file() else None


def register_resolvers() -> None:
    """Register the resolvers `${asset:NAME}` and `${instructions_of:FOLDER}`, which call these functions."""
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    OmegaConf.register_new_resolver("instructions_of", instructions_of, replace=True)


def take_in_instructions(cfg: DictConfig) -> None:
    """Replace the file in `grammar.instructions` by its texts, so that the saved configuration holds them.

    If there is no file, None is stored, so a file that is created later is not read when the run is resumed.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    given = OmegaConf.select(cfg, "grammar.instructions")
    if isinstance(given, str):
        cfg.grammar.instructions = read_instructions(Path(given))
    elif given is None and "instructions" in cfg.grammar:
        cfg.grammar.instructions = None


def as_typed(config_name: str, arguments: list[str]) -> list[str]:
    """Return the arguments, with quotes around texts that Hydra would parse as numbers or booleans.

    Example: a folder named 2024_01. Only values whose every field accepts text are quoted.
    """
    from hydra.errors import HydraException

    from segrl.runs.schema.commands import COMMANDS
    from segrl.runs.schema.kinds import fault
    from segrl.runs.schema.walk import Typed, Walk, plain

    parts = [_VALUE.fullmatch(argument) for argument in arguments]
    odd = {
        i: part for i, part in enumerate(parts)
        if part and (re.match(r"[+-]?[\d.]", part[2]) or part[2].lower() in ("true", "false", "inf", "nan"))
    }  # fmt: skip
    if not odd:
        return arguments
    try:
        raw = plain(without_values(config_name, *chosen_groups(arguments)))
    except (HydraException, OmegaConfBaseException, ValueError):  # reported when the jobs are composed
        return arguments
    takes: dict[str, bool] = {}
    for one in Walk(raw, COMMANDS[config_name]):
        if isinstance(one, Typed):
            takes[one.key] = takes.get(one.key, True) and fault(one.model, one.field, "text") is None
    quoted = {i: f"{part[1]}='{part[2]}'" for i, part in odd.items() if takes.get(part[1].lstrip("+"), False)}
    return [quoted.get(i, argument) for i, argument in enumerate(arguments)]


def experiment_first(arguments: list[str]) -> list[str]:
    """Return the arguments with each `+adapter=` behind `+experiment=`: Hydra lets the later one win."""
    place = 1 + max((i for i, one in enumerate(arguments) if one.startswith("+experiment=")), default=-1)
    adapters = [one for one in arguments[:place] if one.startswith("+adapter=")]
    return [*(one for one in arguments[:place] if one not in adapters), *adapters, *arguments[place:]]


def folders(arguments: list[str]) -> list[Path]:
    """Return segrl's configuration folder and those of `--config-dir` and `hydra.searchpath` that exist."""
    own = [Path(place.removeprefix("file://")) for place in _places(arguments)]
    return [conf_folder(), *(folder for folder in own if folder.is_dir())]


def _places(arguments: list[str]) -> list[str]:
    """Return the folders of `--config-dir`, as URLs, and of `hydra.searchpath`, as given."""
    found = []
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(f"file://{Path(value or ''.join(arguments[i + 1 : i + 2])).resolve()}")
        if argument.startswith(_SEARCH):
            found += [place.strip(" '\"") for place in argument.removeprefix(_SEARCH).strip("[]").split(",")]
    return found


def chosen_groups(arguments: list[str]) -> list[str]:
    """Return the arguments that choose one option of a group, and the override of the search path."""
    names = {path.name for folder in folders(arguments) for path in folder.iterdir() if path.is_dir()}
    chosen = [a for a in arguments if a.lstrip("+~").split("=")[0] in names and ("," not in a or "[" in a)]
    return [*chosen, *_sought(arguments)]


def _sought(arguments: list[str]) -> list[str]:
    """Return the override of `hydra.searchpath` with all folders of `_places`; [] if there are none."""
    places = _places(arguments)
    return [f"{_SEARCH}[{','.join(places)}]"] if places else []


def compose_job(config_name: str, overrides: list[str]) -> DictConfig:
    """Return the composed configuration of one job, without `hydra.main`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config_name, overrides)


@functools.cache
def without_values(config_name: str, *groups: str) -> DictConfig:
    """Return the configuration of the chosen options, without the values that the user sets."""
    return compose_job(config_name, list(groups))


def split_jobs(arguments: list[str]) -> list[list[str]]:
    """Return the overrides of each job, one list per job; a single run is one job.

    Returns [] if a sweeper other than Hydra's basic one chooses them, or if Hydra only prints something.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = get_args_parser().parse_args(arguments)
    sought = _sought(arguments)
    plain = [override for override in parsed.overrides if not override.startswith(_SEARCH)]
    if parsed.cfg or parsed.info or parsed.hydra_help or parsed.shell_completion:
        return []
    if not parsed.multirun:
        return [[*plain, *sought]]
    if any(override.startswith("hydra/sweeper=") for override in plain):
        return []
    overrides = OverridesParser.create().parse_overrides(plain)
    return [[*job, *sought] for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def check(cfg: DictConfig, command: str = "train", files: bool = True) -> None:
    """Check that a configuration can run.

    Args:
        cfg: composed configuration.
        command: command that reads it.
        files: whether the dataset's files are needed.

    Raises:
        Refused: for unknown keys, and values that do not fit.
        Missing: for all missing or empty files and folders.
    """
    check_keys(cfg, command)
    from segrl.runs.schema.sources import missing

    if lines := missing(cfg, files):
        raise Missing(lines)


def check_keys(cfg: DictConfig, command: str = "train") -> None:
    """Raise Refused for unknown keys, values that do not fit their key, or values that conflict."""
    from segrl.runs.schema.commands import COMMANDS, together
    from segrl.runs.schema.interpolations import Fault
    from segrl.runs.schema.walk import faults, plain

    if found := faults(cfg, COMMANDS[command]):
        raise Refused(found)
    if found := [Fault(key, said) for key, said in together(plain(cfg, resolve=True))]:
        raise Refused(found)


def refuse_unread(cfg: DictConfig, said: Said) -> None:
    """Raise Refused for a key or group that the user sets and the stage, or evaluation, does not read."""
    from segrl.runs.schema.unread import unread
    from segrl.runs.schema.walk import plain

    if "stage" in cfg and (found := list(unread(plain(cfg), said.keys))):
        raise Refused(found)
