"""The front door: compose and check a configuration, refuse a mistake before anything is written.

Nothing heavy is imported here. `messages` says a mistake in a line, `help_text` what a command does.
"""

from __future__ import annotations

import functools
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segrl import folder as run_folders
from segrl import stopping
from segrl.messages import Missing, Refused, Said, dotted, explain
from segrl.prompts.instructions import NAME as INSTRUCTIONS
from segrl.prompts.instructions import read as read_instructions

_HERE = Path(__file__).resolve().parent
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


def scored_checkpoint(run: Path) -> Path:
    """Return the checkpoint whose scores a run reports: the best, where one was kept, else the last."""
    best = run / "checkpoints" / "best.ckpt"
    return best if best.is_file() else run / "checkpoints" / "last.ckpt"


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


def enter(config_name: str, job: Callable[[DictConfig], object], files: bool = True) -> None:
    """Run `job` on the configuration of the command line; exit 2 with one line where the user erred.

    SEGRL_TRACE=1 shows the traceback instead.

    Args:
        config_name: YAML of the command.
        job: what is run.
        files: whether it needs the data's files.
    """
    from segrl.help_text import help_of

    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_of(config_name, conf_folder()), flush=True)
            return
        _run(config_name, job, files)
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout.fileno()):  # another pipe, of the job: a worker or a server has died
            raise
        # Whoever read has enough; what Python would flush at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _has_no_reader(descriptor: int) -> bool:
    """Whether it is a pipe or a socket whose other end is closed."""
    watch = select.poll()
    watch.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def _run(config_name: str, job: Callable[[DictConfig], object], files: bool) -> None:
    """Compose, check what can be checked before anything is written, and run."""
    import hydra
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through, so that they are told in one line here
    if (
        here := str(Path.cwd())
    ) not in sys.path:  # a console script lacks it, and a user's own parts stand there
        sys.path.append(here)
    register_resolvers()
    known = (HydraException, OmegaConfBaseException, ValueError, OSError)

    begun: list[DictConfig] = []
    ended: list[DictConfig] = []

    @functools.wraps(job)
    def told(cfg: DictConfig) -> object:
        if stopping.asked() is not None:  # of a sweep the jobs behind the one that was stopped
            return None
        begun.append(cfg)
        with stopping.watched(worker=True):
            try:
                value = job(cfg)
            except known as error:
                _fail_job(error, config_name)
                _tell(error, config_name)
                raise
            except stopping.Stopped as stop:
                stopping.say(stop, config_name in ("train", "evaluate"))
                if len(jobs) < 2:
                    raise
                return None
            finally:
                run_folders.release()
        ended.append(cfg)
        return value

    jobs: list[list[str]] = []
    with stopping.watched():
        try:
            sys.argv[1:] = as_typed(config_name, _held_against_the_run(sys.argv[1:]))
            jobs += _jobs(sys.argv[1:])
            check_jobs(config_name, sys.argv[1:], files)
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(told)()
            if len(jobs) > 1:
                stopping.check()
        except known as error:
            _tell(error, config_name)
            raise
        except stopping.Stopped as stop:
            if len(jobs) > 1 and begun:
                left = len(jobs) - len(begun)
                print(f"the sweep was stopped: {len(ended)} of {len(jobs)} jobs ended, {left} were not begun")
            elif ended:
                print(f"stopped by {stop.name} after its end: all is written")
            else:
                stopping.say(stop, config_name in ("train", "evaluate"))
            stopping.leave(stop)


def check_jobs(config_name: str, arguments: list[str], files: bool) -> None:
    """Compose every job of a command line, and check those that no file has a say in.

    Hydra makes its sweep folder before it composes the first job, so jobs are checked before anything exists.
    """
    if config_name not in ("train", "evaluate"):
        return
    for overrides in _jobs(arguments):
        composed = _composed(config_name, overrides)
        if composed.get("resume") is not None:
            continue
        if config_name == "train":  # an evaluation changes its configuration first, and then checks it
            check(composed, config_name, files)
        refuse_unread(composed, Said(overrides, folders(arguments)))


def refusal(config_name: str, arguments: list[str], only_keys: bool = False) -> list[str] | None:
    """Return the lines that refuse a command line, None where nothing is wrong; nothing is run or written.

    Args:
        config_name: YAML of the command.
        arguments: of the command line.
        only_keys: whether files that are missing are passed over.
    """
    from hydra.errors import HydraException

    register_resolvers()
    try:
        typed = as_typed(config_name, arguments)
        for overrides in _jobs(typed):
            composed = _composed(config_name, overrides)
            (check_keys if only_keys else check)(composed, config_name)
            refuse_unread(composed, Said(overrides, folders(typed)))
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        lines = explain(error, Said(arguments, folders(arguments)), lambda: _keys(config_name, arguments))
        if lines is None:
            raise
        return lines
    return None


def _held_against_the_run(arguments: list[str]) -> list[str]:
    """Where a run goes on, `a.b=c` may name a key that the defaults lack: `resumed` checks the run's own."""
    if not any(argument.startswith("resume=") for argument in arguments):
        return arguments
    return [f"++{a}" if re.match(r"[\w-]+\.[^=]*=", a) else a for a in arguments]


def as_typed(config_name: str, arguments: list[str]) -> list[str]:
    """Return the arguments, with quotes around texts that Hydra would take for numbers, as a folder 2024_01."""
    from hydra.errors import HydraException

    from segrl.schema.commands import COMMANDS
    from segrl.schema.kinds import fault
    from segrl.schema.walk import Typed, Walk, plain

    parts = [_VALUE.fullmatch(argument) for argument in arguments]
    odd = {
        i: part for i, part in enumerate(parts)
        if part and (re.match(r"[+-]?[\d.]", part[2]) or part[2].lower() in ("true", "false", "inf", "nan"))
    }  # fmt: skip
    if not odd:
        return arguments
    try:
        raw = plain(_without_values(config_name, *_groups(arguments)))
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


def _groups(arguments: list[str]) -> list[str]:
    """Of the arguments those that choose options, and where options are sought."""
    names = {path.name for folder in folders(arguments) for path in folder.iterdir() if path.is_dir()}
    chosen = [a for a in arguments if a.lstrip("+~").split("=")[0] in names and ("," not in a or "[" in a)]
    return [*chosen, *_sought(arguments)]


def _sought(arguments: list[str]) -> list[str]:
    """Return the override of `hydra.searchpath` that also holds the folder of `--config-dir`."""
    places = _places(arguments)
    return [f"{_SEARCH}[{','.join(places)}]"] if places else []


def _composed(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration of one job, outside of `hydra.main`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config_name, overrides)


@functools.cache
def _without_values(config_name: str, *groups: str) -> DictConfig:
    """The configuration of the chosen options alone: what the user's keys are sought in."""
    return _composed(config_name, list(groups))


def _jobs(arguments: list[str]) -> list[list[str]]:
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


def _fail_job(error: BaseException, config_name: str) -> None:
    """In a sweep, raise the line of a known mistake for the sweep's callback: it ends the job, not the sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode is RunMode.MULTIRUN and os.environ.get("SEGRL_TRACE") != "1":
        from segrl.tracking.sweep_parent import JobFailedError

        arguments = sys.argv[1:]
        lines = explain(error, Said(arguments, folders(arguments)), lambda: _keys(config_name, arguments))
        if lines is not None:
            raise JobFailedError("; ".join(line.strip() for line in lines)) from error


def _tell(error: BaseException, config_name: str) -> None:
    """Exit with the lines for an error, if it is a known mistake."""
    arguments = sys.argv[1:]
    lines = explain(error, Said(arguments, folders(arguments)), lambda: _keys(config_name, arguments))
    if lines is not None and os.environ.get("SEGRL_TRACE") != "1":
        print("segrl: " + "\n".join(lines), file=sys.stderr)
        sys.exit(2)


def _keys(config_name: str, arguments: list[str]) -> list[str]:
    """All dotted keys of what composes once the value overrides are left out."""
    from hydra.errors import HydraException

    try:
        return dotted(_without_values(config_name, *_groups(arguments)))
    except (HydraException, ValueError):  # Hydra raises both
        return []


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
    from segrl.schema.sources import missing

    if lines := missing(cfg, files):
        raise Missing(lines)


def check_keys(cfg: DictConfig, command: str = "train") -> None:
    """Raise Refused for keys that there are not, values that do not fit or do not go together."""
    from segrl.schema.commands import COMMANDS, together
    from segrl.schema.interpolations import Fault
    from segrl.schema.walk import faults, plain

    if found := faults(cfg, COMMANDS[command]):
        raise Refused(found)
    if found := [Fault(key, said) for key, said in together(plain(cfg, resolve=True))]:
        raise Refused(found)


def refuse_unread(cfg: DictConfig, said: Said) -> None:
    """Raise Refused for a value or an option of the user's that nothing of this stage, or evaluation, reads."""
    from segrl.schema.unread import unread
    from segrl.schema.walk import plain

    if "stage" in cfg and (found := list(unread(plain(cfg), said.keys))):
        raise Refused(found)
