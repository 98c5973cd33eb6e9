"""SIGINT and SIGTERM: the first ends the process once what must be saved is saved, a second one ends it at once.

Outside of `held` the first signal raises `Stopped` where the process stands. Inside, it is remembered, and whoever holds it
asks for it at points where everything can be left (`asked`, `check`).
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util  # its exit handler is to be registered before ours, which then runs first
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FIRST = (
    "SEGRL_FIRST_PROCESS"  # processes that Lightning starts find the id of the one that started them here
)
_TOGETHER = 1.0  # seconds: a group's signal and the one that a launcher sends on are one
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Stopped(SystemExit):
    """The process was asked to stop.

    Args:
        signum: of the signal.
        agreed: whether all ranks stop at the same point.
    """

    def __init__(self, signum: int, agreed: bool = False) -> None:
        super().__init__(128 + signum)
        self.signum, self.agreed = signum, agreed
        self.told = False  # whether a line has said what was kept

    @property
    def name(self) -> str:
        """Of the signal, such as `SIGTERM`."""
        return signal.Signals(self.signum).name


@dataclass(slots=True)
class _State:
    """Of this process."""

    signum: int | None = None
    came: float = 0.0
    holds: int = 0
    watching: bool = False
    commands: int = 0  # that were watched in this process


_state = _State()


def _answer(signum: int, frame: FrameType | None) -> None:
    """Handle a signal."""
    now = time.monotonic()
    if _state.signum is None:
        _state.signum, _state.came = signum, now
        if not _state.holds:
            raise Stopped(signum)
    elif now - _state.came > _TOGETHER:
        os.write(2, f"segrl: a second signal ({signal.Signals(signum).name}): stopped at once\n".encode())
        end_workers()
        os._exit(128 + signum)


@contextmanager
def watched(worker: bool = False) -> Iterator[None]:
    """Inside, signals are answered as this module says; afterwards as before. Nothing changes where that is so already.

    Args:
        worker: whether this may be a process that a sweep's launcher started: it runs a job of its own, and is no rank.
    """
    if worker and _state.watching:
        yield
        return
    _state.signum, _state.holds, _state.watching = None, 0, True
    _state.commands += 1
    first = os.environ.get(_FIRST)
    if is_child() and not worker:
        end_with_parent()
    else:
        os.environ[_FIRST] = str(os.getpid())
    main = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers
    before = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    take()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _state.signum, _state.watching = None, False
        if first is None:
            os.environ.pop(_FIRST, None)
        else:
            os.environ[_FIRST] = first


def take() -> None:
    """Put the handlers in place: Lightning's trainer sets its own when it begins, which know of one rank."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _answer)


@contextmanager
def held() -> Iterator[None]:
    """Inside, the first signal raises nothing: `check` afterwards."""
    _state.holds += 1
    try:
        yield
    finally:
        _state.holds -= 1


def asked() -> int | None:
    """Return the number of the signal that came, or `None`."""
    return _state.signum


def check() -> None:
    """Raise `Stopped` if a signal came."""
    if _state.signum is not None:
        raise Stopped(_state.signum)


def say(stop: Stopped, writes_at_once: bool) -> None:
    """Print one line for a process that was stopped, unless the job itself has told what it kept.

    Args:
        stop: what ended it.
        writes_at_once: whether the command makes a folder as soon as it is built, and has a line of its own from then on.
    """
    if not stop.told and not is_child():
        what = " before anything was written" if writes_at_once else "; nothing half-written is left"
        print(f"stopped by {stop.name}{what}", flush=True)
    stop.told = True


def leave(stop: Stopped) -> NoReturn:
    """End the process that was asked to stop, and its children."""
    if is_child() and stop.agreed:
        sys.exit(0)  # its parent takes anything else for a failure, and kills itself
    if is_child():
        time.sleep(3)  # where the whole group was asked, its parent's end is its own
        print(f"segrl: a rank was stopped by {stop.name}, alone: the run ends", file=sys.stderr, flush=True)
    end_workers()
    sys.stdout.flush()
    if ranks() > 1 and not stop.agreed:
        os._exit(128 + stop.signum)  # others wait in a collective operation, as would exit handlers
    sys.exit(stop.code)


def environment() -> dict[str, str]:
    """Return the environment for a process that is a run of its own, and no further rank of this one."""
    return {name: value for name, value in os.environ.items() if name != _FIRST}


def ranks() -> int:
    """Return how many processes the run has, as their launchers say; 1 where there is none."""
    names = ["WORLD_SIZE"]
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive") and "SLURM_PROCID" in os.environ:
        names.append("SLURM_NTASKS")  # an allocation that one types in starts no tasks, for Lightning neither
    said = [os.environ.get(name, "") for name in names]
    return max(int(count) if count.isdecimal() else 1 for count in said)


def is_child() -> bool:
    """Return whether this is a further rank, started by the first process of the run."""
    return os.environ.get(_FIRST) == str(os.getppid())


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_to_parent() -> None:
    """Prepare a loader's process: a signal that is sent to the whole group is answered by the run, which ends its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _in_fork() -> None:
    """Ignore a group's signal from the first moment of a worker, which has its parent's handlers."""
    if _state.watching:
        _state.watching = False
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_fork)


@atexit.register
def end_workers() -> None:
    """Kill the workers of a command: `multiprocessing` waits for them at the end, and they ignore its SIGTERM."""
    workers = [child for child in multiprocessing.active_children() if child.daemon and _state.commands]
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises where a worker is killed
    for worker in workers:
        worker.kill()
