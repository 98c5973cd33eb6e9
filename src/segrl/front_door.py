"""The front door: composes and checks a configuration, and turns a user's mistake into one line.

Nothing heavy is imported here, and nothing is written before the configuration is known to be good.
"""

from __future__ import annotations

import difflib
import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segrl import folder as folders
from segrl import stopping

_HERE = Path(__file__).resolve().parent


def conf_folder() -> Path:
    """The configuration tree: of the checkout, or of the installed wheel."""
    for folder in (_HERE.parent.parent / "conf", _HERE / "_conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"segrl is installed without its configuration: neither {_HERE / '_conf'} nor ../conf exists"
    )


def experiments() -> list[str]:
    """Names of all experiments."""
    return sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml"))


def asset(name: str) -> str:
    """Path of a file or folder that ships with the package."""
    return str(_HERE / "assets" / name)


def scored_checkpoint(run: Path) -> Path:
    """The checkpoint whose scores a run reports: the best, where one was kept, else the last."""
    best = run / "checkpoints" / "best.ckpt"
    return best if best.is_file() else run / "checkpoints" / "last.ckpt"


def register_resolvers() -> None:
    """`${asset:NAME}` in a configuration is `asset(NAME)`."""
    OmegaConf.register_new_resolver("asset", asset, replace=True)


def enter(config_name: str, job: Callable[[DictConfig], object]) -> None:
    """Run `job` on the configuration that the command line composes; exit 2 with one line where the user erred.

    SEGRL_TRACE=1 shows the traceback instead.
    """
    import hydra
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through, so that they are told in one line here
    sys.argv[1:] = _held_against_the_run(sys.argv[1:])
    register_resolvers()
    known = (HydraException, OmegaConfBaseException, ValueError, OSError)

    begun: list[DictConfig] = []
    ended: list[DictConfig] = []

    @functools.wraps(job)
    def told(cfg: DictConfig) -> object:
        if stopping.asked() is not None:  # of a sweep the jobs behind the one that was stopped
            return None
        begun.append(cfg)
        try:
            value = job(cfg)
        except known as error:
            _tell(error, config_name)
            raise
        except stopping.Stopped as stop:
            _say_stopped(stop, config_name)
            if len(jobs) < 2:
                raise
            return None
        finally:
            folders.release()
        ended.append(cfg)
        return value

    jobs: list[list[str]] = []
    with stopping.watched():
        try:
            jobs += _sweep_jobs(sys.argv[1:])
            for overrides in jobs:
                composed = _composed(config_name, overrides)
                if "stage" in composed and composed.get("model") is None:  # a model's folder still has a say
                    check(composed)
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
                _say_stopped(stop, config_name)
            _leave(stop)


def _say_stopped(stop: stopping.Stopped, config_name: str) -> None:
    """Print one line, unless the job itself has told what it kept."""
    if not stop.told and not stopping.is_child():
        written = (
            "before anything was written"
            if config_name in ("train", "evaluate")
            else "; nothing half-written is left"
        )
        print(f"stopped by {stop.name} {written}".replace(" ;", ";"), flush=True)
    stop.told = True


def _leave(stop: stopping.Stopped) -> NoReturn:
    """End the process that was asked to stop, and its children."""
    if stopping.is_child() and stop.agreed:
        sys.exit(0)  # its parent takes anything else for a failure, and kills itself
    if stopping.is_child():
        time.sleep(3)  # where the whole group was asked, its parent's end is its own
        print(f"segrl: a rank was stopped by {stop.name}, alone: the run ends", file=sys.stderr, flush=True)
    stopping.end_workers()
    sys.stdout.flush()
    if stopping.ranks() > 1 and not stop.agreed:
        os._exit(128 + stop.signum)  # others wait in a collective operation, as would exit handlers
    sys.exit(stop.code)


def _held_against_the_run(arguments: list[str]) -> list[str]:
    """Where a run goes on, `a.b=c` may name a key that the defaults lack: `resumed` says whether the run has it."""
    if not any(argument.startswith("resume=") for argument in arguments):
        return arguments
    return [f"++{a}" if re.match(r"[\w-]+\.[^=]*=", a) else a for a in arguments]


def _composed(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration of one job, outside of `hydra.main`."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config_name, overrides)


def _sweep_jobs(arguments: list[str]) -> list[list[str]]:
    """The overrides of each job of a multirun; none where it is a single run.

    Hydra makes its sweep folder before it composes the first job, so the jobs are checked here, before anything exists.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = get_args_parser().parse_args(arguments)
    if not parsed.multirun or any(override.startswith("hydra/sweeper=") for override in parsed.overrides):
        return []
    overrides = OverridesParser.create().parse_overrides(parsed.overrides)
    return [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def _tell(error: BaseException, config_name: str) -> None:
    """Exit with one line, if the error is a known mistake."""
    line = explain(error, config_name, sys.argv[1:])
    if line is not None and os.environ.get("SEGRL_TRACE") != "1":
        print(f"segrl: {line}", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException, config_name: str, arguments: list[str]) -> str | None:
    """One line for a mistake of the user's, or none where the error is not known to be one."""
    from hydra.errors import HydraException, InstantiationException
    from pydantic import ValidationError

    from segrl.schema import first_fault

    cause = error
    while isinstance(cause, HydraException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ValidationError):
        return first_fault(cause)
    if isinstance(error, InstantiationException) and isinstance(cause, TypeError):
        return _unbound(str(error))
    if isinstance(cause, HydraException | OmegaConfBaseException):
        return _composition(str(cause), config_name, arguments)
    if type(cause).__name__ == "MisconfigurationException":  # Lightning's word for a trainer that cannot be
        return f"trainer: {' '.join(str(cause).split())}"
    if isinstance(cause, OSError):
        if cause.errno == errno.ENOSPC:
            return f"paths.runs: no space is left to write {cause.filename or 'the run'}; what was saved before is intact"
        return None if cause.filename is None else f"{cause.filename}: {str(cause.strerror).lower()}"
    if isinstance(cause, ValueError) and _raised_here(cause):
        return " ".join(str(cause).split())
    if isinstance(cause, ValueError) and str(cause).startswith("Caught ValueError in DataLoader worker"):
        return " ".join(str(cause).strip().splitlines()[-1].removeprefix("ValueError: ").split())
    return None


def _raised_here(error: BaseException) -> bool:
    """Whether segrl itself raised it: a library's ValueError is a bug of ours, and keeps its traceback."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and Path(at.tb_frame.f_code.co_filename).resolve().is_relative_to(_HERE)


def _unbound(message: str) -> str:
    """A constructor that was given a key it does not take, or not one it needs."""
    where = re.search(r"full_key: (\S+)", message)
    what = re.search(r"unexpected keyword argument '(\w+)'", message)
    node = where.group(1) if where else "the configuration"
    if what:
        return f"{node}.{what.group(1)}: its constructor takes no such key"
    return f"{node}: {' '.join(message.splitlines()[0].split())}"


def _composition(message: str, config_name: str, arguments: list[str]) -> str:
    """Hydra's and OmegaConf's own errors, with the nearest real key."""
    if missing := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{missing.group(1)}: a value is needed; none is set"
    if unknown := re.search(r"Could not override '([^']+)'", message) or re.search(
        r"Key '(\S+)' is not in struct", message
    ):
        key = unknown.group(1)
        if full := re.search(r"full_key: (\S+)", message):
            key = full.group(1)
        if key in ("experiment", "suite", "testset"):
            return f"{key}: it is added to the defaults: write +{key}=NAME"
        return f"{key}: there is no such key{_nearest(key, list(_keys(config_name, arguments)))}"
    if twice := re.search(r"Multiple values for (\S+)\. To override", message):
        return f"{twice.group(1)}: it is in the defaults: write {twice.group(1)}=NAME, without +"
    if option := re.search(r"(?:Could not find|In '[^']+': Could not find) '([^']+)'", message):
        group, _, name = option.group(1).rpartition("/")
        options = [path.stem for path in (conf_folder() / group).glob("[!_]*.yaml")]
        return f"{group}={name}: there is no such option{_nearest(name, options)} (there are: {', '.join(sorted(options))})"
    return " ".join(message.split())


def _nearest(word: str, words: list[str]) -> str:
    """`; did you mean ...?`, if anything is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _keys(config_name: str, arguments: list[str]) -> Iterator[str]:
    """All dotted keys of what composes once the value overrides are left out."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    groups = [folder.name for folder in conf_folder().iterdir() if folder.is_dir()]
    chosen = [a for a in arguments if a.lstrip("+~").split("=")[0] in groups and "," not in a]
    GlobalHydra.instance().clear()
    try:
        config = _composed(config_name, chosen)
    except HydraException:
        return
    yield from _flat(OmegaConf.to_container(config, resolve=False), "")


def _flat(node: object, prefix: str) -> Iterator[str]:
    """Dotted keys of a nested mapping."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _flat(value, f"{prefix}{key}.")


def check(cfg: DictConfig) -> None:
    """Refuse a configuration that cannot run.

    Raises:
        pydantic.ValidationError: for a value out of range.
        ValueError: for a file or a folder that is not there, naming its key and, where they are known, the place where its owners publish it.
    """
    from segrl.schema import EvaluateConfig, TrainConfig

    schema = EvaluateConfig if "suite" in cfg else TrainConfig
    schema.model_validate(OmegaConf.to_container(cfg, resolve=True))
    for key, owners in cfg.sources.items():
        path = OmegaConf.select(cfg, key)
        if path is not None and not Path(path).exists():
            raise ValueError(f"{key}: there is no {path}; its owners publish it at {owners}")
    root = None if cfg.get("testsets") else OmegaConf.select(cfg, "data.root")
    if root is not None and not Path(root).is_dir():
        raise ValueError(
            f"data.root: a folder is needed; {root} is {'a file' if Path(root).exists() else 'not there'}"
        )
    for key in ("ckpt_path", "init_from"):
        if cfg[key] is not None and not Path(cfg[key]).is_file():
            raise ValueError(f"{key}: a checkpoint is needed; there is no file {cfg[key]}")


def resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of the run folder `cfg.resume`, with plain values of it changed.

    Raises:
        ValueError: if the folder holds no run, or an override is not a value of that run.
    """
    home = Path(cfg.resume)
    checkpoint = home / "checkpoints" / "last.ckpt"
    before = saved_config(home, "resume")
    if not checkpoint.is_file() and (home / "metrics.json").exists():
        raise ValueError(f"resume: the checkpoint of a finished run is needed; {checkpoint} is gone")
    for override in (o.removeprefix("++") for o in overrides):
        key, _, value = override.partition("=")
        if key == "resume":
            continue
        if re.match(r"stage\.(optimizer|schedule)\b", key):
            raise ValueError(
                f"resume: optimizer and schedule go on as they were saved; {override} cannot be changed"
            )
        parent, _, last = key.rpartition(".")
        if not parent or last not in (OmegaConf.select(before, parent) or {}):
            raise ValueError(
                f"resume: the run goes on with its own configuration; {override} cannot be changed"
            )
        OmegaConf.update(before, key, OmegaConf.create(f"v: {value}").v)
    before.resume, before.paths.run = str(home), str(home)
    if (
        checkpoint.exists()
    ):  # a run that was stopped before its first checkpoint begins anew, at its first update
        before.ckpt_path = str(checkpoint)
    return before


def saved_config(home: Path, key: str) -> DictConfig:
    """Return the configuration in a run's folder.

    Raises:
        ValueError: if there is none, or it cannot be read, or is not all that a run's configuration holds.
    """
    from pydantic import ValidationError
    from yaml import YAMLError

    from segrl.schema import EvaluateConfig, TrainConfig, first_fault

    path = home / "config.yaml"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{key}: a run folder, which holds config.yaml, is needed; {path} {what}")
    try:
        found = OmegaConf.load(path)
        if not isinstance(found, DictConfig):
            raise ValueError("it holds a list")
        schema = EvaluateConfig if "suite" in found else TrainConfig
        schema.model_validate(OmegaConf.to_container(found, resolve=True))
    except ValidationError as error:
        raise ValueError(f"{key}: {path} must be the configuration of a run; {first_fault(error)}") from None
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{key}: {path} must be the configuration of a run; {reason}") from None
    return found
