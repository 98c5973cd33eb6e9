"""Handle SIGINT and SIGTERM: the first ends the process after it has saved its work, a second at once.

Outside of `held`, the first signal raises `Stopped` immediately. Inside, it is only stored, and the code asks
for it at safe points (`asked`, `check`).
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util  # registers its exit handler before ours, so that ours runs first
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
# Environment variable with the id of the run's first process; Lightning's further processes inherit it.
_FIRST = "SEGRL_FIRST_PROCESS"
_TOGETHER = 1.0  # seconds in which a second signal is ignored: a launcher may forward its group's signal
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Stopped(SystemExit):
    """Raised if the process was asked to stop.

    Args:
        signum: number of the signal.
        agreed: whether all ranks stop at the same point.
    """

    def __init__(self, signum: int, agreed: bool = False) -> None:
        super().__init__(128 + signum)
        self.signum, self.agreed = signum, agreed
        self.told = False  # whether a line about what was saved has been printed

    @property
    def name(self) -> str:
        """The signal's name, such as `SIGTERM`."""
        return signal.Signals(self.signum).name


@dataclass(slots=True)
class _State:
    """The state of signal handling in this process."""

    signum: int | None = None  # the signal that was received
    came: float = 0.0  # when
    holds: int = 0  # active `held` blocks
    watching: bool = False  # inside `watched`
    commands: int = 0  # number of `watched` blocks so far


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
    """Handle signals inside as this module describes, and restore the earlier handlers afterwards.

    Args:
        worker: whether this is a job of a sweep, which may run in a process of its own and is never a rank.
            A job in a process that is watched already changes nothing.
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
    main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
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
    """Install the handlers; again after Lightning's trainer has installed its own, which know one rank."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _answer)


@contextmanager
def held() -> Iterator[None]:
    """Store the first signal inside instead of raising `Stopped`; call `check` afterwards."""
    _state.holds += 1
    try:
        yield
    finally:
        _state.holds -= 1


def asked() -> int | None:
    """Return the number of the signal that was received, or None."""
    return _state.signum


def check() -> None:
    """Raise `Stopped` if a signal was received."""
    if _state.signum is not None:
        raise Stopped(_state.signum)


def say(stop: Stopped, writes_at_once: bool) -> None:
    """Print one line for a process that was stopped, unless the job has printed what it saved.

    Args:
        stop: the exception.
        writes_at_once: whether the command creates its folder as soon as it is built. From then on it prints
            its own line.
    """
    if not stop.told and not is_child():
        what = " before anything was written" if writes_at_once else "; nothing half-written is left"
        print(f"stopped by {stop.name}{what}", flush=True)
    stop.told = True


def leave(stop: Stopped) -> NoReturn:
    """End this process and its workers, with the exit code 128 + signal; a rank that agreed exits with 0."""
    if is_child() and stop.agreed:
        sys.exit(0)  # on any other code the parent assumes a failure and kills itself
    if is_child():
        time.sleep(3)  # if the parent was signalled, too, its end kills this process meanwhile
        print(f"segrl: a rank was stopped by {stop.name}, alone: the run ends", file=sys.stderr, flush=True)
    end_workers()
    sys.stdout.flush()
    if ranks() > 1 and not stop.agreed:
        os._exit(128 + stop.signum)  # exit handlers would wait for ranks in a collective operation
    sys.exit(stop.code)


def environment() -> dict[str, str]:
    """Return the environment for a process that is a separate run and not a rank of this one."""
    return {name: value for name, value in os.environ.items() if name != _FIRST}


def ranks() -> int:
    """Return the number of processes that a launcher has set for the run; 1 without a launcher."""
    names = ["WORLD_SIZE"]
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive") and "SLURM_PROCID" in os.environ:
        names.append("SLURM_NTASKS")  # an interactive allocation starts no tasks; Lightning does the same
    said = [os.environ.get(name, "") for name in names]
    return max(int(count) if count.isdecimal() else 1 for count in said)


def is_child() -> bool:
    """Return whether this process is a rank that the run's first process has started."""
    return os.environ.get(_FIRST) == str(os.getppid())


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_to_parent() -> None:
    """Ignore signals in a loader's worker process, which the run ends, and let it end with its parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _in_fork() -> None:
    """Ignore signals in a forked worker from its start, because it inherits its parent's handlers."""
    if _state.watching:
        _state.watching = False
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_fork)


@atexit.register
def end_workers() -> None:
    """Kill the daemon workers of a command.

    `multiprocessing` would send them SIGTERM at the end, which they ignore, and wait for them.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon and _state.commands]
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises if a worker is killed
    for worker in workers:
        worker.kill()
