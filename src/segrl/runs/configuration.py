"""Compose a configuration, look up what it refers to, and refuse what cannot run. Nothing heavy is imported here."""

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
    """Return the configuration tree: of the checkout, or of the installed wheel."""
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
    """Return the file of instructions that lies beside a policy's weights, or None where there is none.

    What is no name of a folder has none, too: it is refused as `policy.weights`, the key that it stands in.
    """
    if not isinstance(weights, str) or not weights:
        return None
    beside = Path(weights) / INSTRUCTIONS
    return str(beside) if beside.is_file() else None


def register_resolvers() -> None:
    """Let a configuration say `${asset:NAME}` for `asset(NAME)`, and `${instructions_of:FOLDER}` for `instructions_of(FOLDER)`."""
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    OmegaConf.register_new_resolver("instructions_of", instructions_of, replace=True)


def take_in_instructions(cfg: DictConfig) -> None:
    """Put the texts of `grammar.instructions` in place of their file, so that a run's folder says what was asked.

    Where there is no file, the folder says so: one that comes later changes nothing.

    Raises:
        ValueError: if the file is not there, or is damaged.
    """
    given = OmegaConf.select(cfg, "grammar.instructions")
    if isinstance(given, str):
        cfg.grammar.instructions = read_instructions(Path(given))
    elif given is None and "instructions" in cfg.grammar:
        cfg.grammar.instructions = None


def as_typed(config_name: str, arguments: list[str]) -> list[str]:
    """Return the arguments, with quotes around texts that Hydra would take for numbers, as a folder 2024_01."""
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
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
    ):  # told when the whole command line is composed
        return arguments
    takes: dict[str, bool] = {}
    for one in Walk(raw, COMMANDS[config_name]):
        if isinstance(one, Typed):
            takes[one.key] = takes.get(one.key, True) and fault(one.model, one.field, "text") is None
    quoted = {i: f"{part[1]}='{part[2]}'" for i, part in odd.items() if takes.get(part[1].lstrip("+"), False)}
    return [quoted.get(i, argument) for i, argument in enumerate(arguments)]


def folders(arguments: list[str]) -> list[Path]:
    """Return all folders with groups of options: segrl's, those of `--config-dir` and `hydra.searchpath`."""
    own = [Path(place.removeprefix("file://")) for place in _places(arguments)]
    return [conf_folder(), *(folder for folder in own if folder.is_dir())]


def _places(arguments: list[str]) -> list[str]:
    """Return the configuration folders that `--config-dir` and `hydra.searchpath` name."""
    found = []
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(f"file://{Path(value or ''.join(arguments[i + 1 : i + 2])).resolve()}")
        if argument.startswith(_SEARCH):
            found += [place.strip(" '\"") for place in argument.removeprefix(_SEARCH).strip("[]").split(",")]
    return found


def chosen_groups(arguments: list[str]) -> list[str]:
    """Of the arguments those that choose options, and where options are sought."""
    names = {path.name for folder in folders(arguments) for path in folder.iterdir() if path.is_dir()}
    chosen = [a for a in arguments if a.lstrip("+~").split("=")[0] in names and ("," not in a or "[" in a)]
    return [*chosen, *_sought(arguments)]


def _sought(arguments: list[str]) -> list[str]:
    """Return the override of `hydra.searchpath` that also holds the folder of `--config-dir`."""
    places = _places(arguments)
    return [f"{_SEARCH}[{','.join(places)}]"] if places else []


def compose_job(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration of one job, outside of `hydra.main`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config_name, overrides)


@functools.cache
def without_values(config_name: str, *groups: str) -> DictConfig:
    """The configuration of the chosen options alone: what the user's keys are sought in."""
    return compose_job(config_name, list(groups))


def split_jobs(arguments: list[str]) -> list[list[str]]:
    """Return the overrides of each job: one list for a single run, [] where another sweeper chooses them."""
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
    """Refuse a configuration that cannot run.

    Args:
        cfg: composed.
        command: that it is for.
        files: whether the data's files are needed.

    Raises:
        Refused: for keys that there are not, and values that do not fit.
        Missing: for all files and folders that are not there.
    """
    check_keys(cfg, command)
    from segrl.runs.schema.sources import missing

    if lines := missing(cfg, files):
        raise Missing(lines)


def check_keys(cfg: DictConfig, command: str = "train") -> None:
    """Raise Refused for keys that there are not, values that do not fit or do not go together."""
    from segrl.runs.schema.commands import COMMANDS, together
    from segrl.runs.schema.interpolations import Fault
    from segrl.runs.schema.walk import faults, plain

    if found := faults(cfg, COMMANDS[command]):
        raise Refused(found)
    if found := [Fault(key, said) for key, said in together(plain(cfg, resolve=True))]:
        raise Refused(found)


def refuse_unread(cfg: DictConfig, said: Said) -> None:
    """Raise Refused for a value or an option of the user's that nothing of this stage, or evaluation, reads."""
    from segrl.runs.schema.unread import unread
    from segrl.runs.schema.walk import plain

    if "stage" in cfg and (found := list(unread(plain(cfg), said.keys))):
        raise Refused(found)
