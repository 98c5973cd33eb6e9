"""Run a command: check its configuration before anything is written, and report a user's mistake in one line.

The exit code is then 2. Nothing heavy is imported here. `messages` makes the line; `help_text` makes the
text of `--help`.
"""

from __future__ import annotations

import functools
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from segrl.host import signals
from segrl.host.files import release
from segrl.runs.configuration import (
    as_typed,
    check,
    check_keys,
    chosen_groups,
    compose_job,
    conf_folder,
    experiment_first,
    folders,
    refuse_unread,
    register_resolvers,
    split_jobs,
    without_values,
)
from segrl.runs.messages import Said, dotted, explain


def enter(config_name: str, job: Callable[[DictConfig], object], files: bool = True) -> None:
    """Run `job` on the configuration of the command line; on a user's mistake print one line and exit with 2.

    With SEGRL_TRACE=1 the traceback is shown instead. With `--help` the help is printed and nothing is run.

    Args:
        config_name: name of the command's YAML, without suffix.
        job: function to run.
        files: whether the dataset's files are needed.
    """
    from segrl.runs.help_text import help_of

    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_of(config_name, conf_folder()), flush=True)
            return
        _run(config_name, job, files)
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout.fileno()):  # the broken pipe is to a worker or a server
            raise
        # The reader of stdout is gone: redirect stdout, so that the flush at exit does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _has_no_reader(descriptor: int) -> bool:
    """Return whether a descriptor is a pipe or a socket whose other end is closed."""
    watch = select.poll()
    watch.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def _run(config_name: str, job: Callable[[DictConfig], object], files: bool) -> None:
    """Check all jobs before anything is written, then let Hydra run them."""
    import hydra
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise errors, which are printed in one line here
    # A console script lacks the working directory, which may hold the user's own parts.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    register_resolvers()
    known = (HydraException, OmegaConfBaseException, ValueError, OSError)

    begun: list[DictConfig] = []
    ended: list[DictConfig] = []

    @functools.wraps(job)
    def told(cfg: DictConfig) -> object:
        if signals.asked() is not None:  # skip the remaining jobs of a stopped sweep
            return None
        begun.append(cfg)
        with signals.watched(worker=True):
            try:
                value = job(cfg)
            except known as error:
                _fail_job(error, config_name)
                _tell(error, config_name)
                raise
            except signals.Stopped as stop:
                signals.say(stop, config_name in ("train", "evaluate"))
                if len(jobs) < 2:
                    raise
                return None
            finally:
                release()
        ended.append(cfg)
        return value

    jobs: list[list[str]] = []
    with signals.watched():
        try:
            sys.argv[1:] = as_typed(config_name, _held_against_the_run(experiment_first(sys.argv[1:])))
            jobs += split_jobs(sys.argv[1:])
            check_jobs(config_name, sys.argv[1:], files)
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(told)()
            if len(jobs) > 1:
                signals.check()
        except known as error:
            _tell(error, config_name)
            raise
        except signals.Stopped as stop:
            if len(jobs) > 1 and begun:
                left = len(jobs) - len(begun)
                print(f"the sweep was stopped: {len(ended)} of {len(jobs)} jobs ended, {left} were not begun")
            elif ended:
                print(f"stopped by {stop.name} after the run ended: everything is written")
            else:
                signals.say(stop, config_name in ("train", "evaluate"))
            signals.leave(stop)


def check_jobs(config_name: str, arguments: list[str], files: bool) -> None:
    """Compose every job of a training or an evaluation, and check all that do not resume a run.

    Hydra creates the sweep folder before it composes the first job, so all jobs are checked first.
    """
    if config_name not in ("train", "evaluate"):
        return
    for overrides in split_jobs(arguments):
        composed = compose_job(config_name, overrides)
        if composed.get("resume") is not None:
            continue
        if config_name == "train":  # segrl.evaluate changes its configuration before it checks it
            check(composed, config_name, files)
        refuse_unread(composed, Said(overrides, folders(arguments)))


def refusal(config_name: str, arguments: list[str], only_keys: bool = False) -> list[str] | None:
    """Return the error lines for a command line, or None if it is valid; run and write nothing.

    Args:
        config_name: name of the command's YAML, without suffix.
        arguments: arguments of the command line.
        only_keys: whether missing files are ignored.
    """
    from hydra.errors import HydraException

    register_resolvers()
    try:
        typed = as_typed(config_name, experiment_first(arguments))
        for overrides in split_jobs(typed):
            composed = compose_job(config_name, overrides)
            (check_keys if only_keys else check)(composed, config_name)
            refuse_unread(composed, Said(overrides, folders(typed)))
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        lines = explain(error, Said(arguments, folders(arguments)), lambda: _keys(config_name, arguments))
        if lines is None:
            raise
        return lines
    return None


def _held_against_the_run(arguments: list[str]) -> list[str]:
    """Return the arguments; with `resume=`, each `a.b=c` gets the prefix `++`.

    Hydra then accepts keys of the saved run that the defaults lack; `resumed` rejects unknown keys.
    """
    if not any(argument.startswith("resume=") for argument in arguments):
        return arguments
    return [f"++{a}" if re.match(r"[\w-]+\.[^=]*=", a) else a for a in arguments]


def _fail_job(error: BaseException, config_name: str) -> None:
    """In a sweep, raise a user's mistake as JobFailedError: SweepParent then ends the job, not the sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode is RunMode.MULTIRUN and os.environ.get("SEGRL_TRACE") != "1":
        from segrl.tracking.sweep_parent import JobFailedError

        arguments = sys.argv[1:]
        lines = explain(error, Said(arguments, folders(arguments)), lambda: _keys(config_name, arguments))
        if lines is not None:
            raise JobFailedError("; ".join(line.strip() for line in lines)) from error


def _tell(error: BaseException, config_name: str) -> None:
    """Print the lines for an error and exit with 2 if it is a known mistake of the user; else return."""
    arguments = sys.argv[1:]
    lines = explain(error, Said(arguments, folders(arguments)), lambda: _keys(config_name, arguments))
    if lines is not None and os.environ.get("SEGRL_TRACE") != "1":
        print("segrl: " + "\n".join(lines), file=sys.stderr)
        sys.exit(2)


def _keys(config_name: str, arguments: list[str]) -> list[str]:
    """Return all dotted keys of the configuration without value overrides; [] if it cannot be composed."""
    from hydra.errors import HydraException

    try:
        return dotted(without_values(config_name, *chosen_groups(arguments)))
    except (HydraException, ValueError):  # Hydra may raise either
        return []
