"""Read a chain (runs that start from each other's checkpoints), run it in order, and tabulate its scores."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from segrl.host import signals
from segrl.host.files import own, release
from segrl.tracking.run_folder import RunFolder, read_json

_OWN = ("experiment", "seed", "name", "paths.run", "init_from", "resume", "ckpt_path")
_COLUMNS = ("run", "start", "seed", "completions", "before", "after", "gain", "95 % interval of the gain")


class Job(BaseModel):
    """One run of a chain."""

    model_config = ConfigDict(extra="forbid")
    name: str
    experiment: str
    start: str | None = None
    """Name of the run whose checkpoint it starts from; if None, it starts from `policy.weights`."""
    overrides: list[str] = []
    reinforced: bool = False
    """Whether the chain's `reinforced` overrides apply to it."""
    seeds: list[int] = [1]


class Chain(BaseModel):
    """List of runs; each comes after the run that it starts from."""

    model_config = ConfigDict(extra="forbid")
    title: str
    metric: str
    """Score of the first test set that the table shows: `sm`, `iou`, `mae` or `fault_rate`."""
    overrides: list[str] = []
    """Overrides of every run."""
    reinforced: list[str] = []
    """Overrides of the runs marked `reinforced`; a run's own overrides follow them."""
    jobs: list[Job]


def read(path: Path) -> Chain:
    """Load a chain from a YAML file.

    Raises:
        ValueError: if there is no such file or it is not YAML, or naming the first wrong key. A `start` must
            name an earlier run.
    """
    import yaml

    from segrl.data.boundary import validated
    from segrl.metrics.saliency import NAMES

    if not path.is_file():
        raise ValueError(f"chain: must be a YAML file; there is no file {path}")
    try:
        loaded = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path}: must be YAML; it cannot be read ({' '.join(str(error).split())})"
        ) from None
    chain = validated(Chain, loaded, f"{path}: ")
    if chain.metric not in NAMES:
        raise ValueError(f"{path}: metric: must be one of {', '.join(NAMES)}; got {chain.metric}")
    known: list[str] = []
    for job in chain.jobs:
        if job.start is not None and job.start not in known:
            raise ValueError(
                f"{path}: {job.name}.start: must be an earlier run ({', '.join(known) or 'there is none'}); "
                f"got {job.start}"
            )
        known.append(job.name)
    return chain


def with_overrides(chain: Chain, overrides: list[str]) -> Chain:
    """Return the chain with overrides appended to those of each run, so that they take precedence.

    Raises:
        ValueError: naming an override that is neither `key=value` nor `~key`, or whose key the chain sets.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not override.startswith("~") and not (key and equals):
            raise ValueError(f"chain: overrides must be key=value or group=option; got {override}")
        if key.lstrip("+~") in _OWN:
            raise ValueError(
                f"chain: {key.lstrip('+~')} must not be given, because the chain sets it for each run; "
                f"got {override}"
            )
    jobs = [job.model_copy(update={"overrides": [*job.overrides, *overrides]}) for job in chain.jobs]
    return chain.model_copy(update={"jobs": jobs})


def folder_of(runs: Path, job: Job, seed: int) -> Path:
    """Return the folder of one run; its name has the seed if the job has several."""
    return runs / (job.name if len(job.seeds) == 1 else f"{job.name}-seed{seed}")


def command(chain: Chain, job: Job, seed: int, runs: Path) -> list[str] | None:
    """Return the command line that starts or resumes a run; None if the run is finished.

    The folder of a run that was killed before it wrote its config.yaml is deleted.

    Raises:
        ValueError: if another process has locked that folder.
    """
    folder = folder_of(runs, job, seed)
    module = [sys.executable, "-m", "segrl.train"]
    if RunFolder(folder).finished:
        return None
    if RunFolder(folder).config.is_file():  # begun: resume from its checkpoint or, without one, from step 0
        return [*module, f"resume={folder}"]
    if folder.is_dir():  # killed before it wrote its configuration
        own(folder, "chain")
        release()
        shutil.rmtree(folder)
    start = next((other for other in chain.jobs if other.name == job.start), None)
    begin = [f"init_from={RunFolder(folder_of(runs, start, start.seeds[0])).scored}"] if start else []
    fixed = [f"seed={seed}", f"name={job.name}", f"paths.run={folder}", *begin]
    shared = [*chain.overrides, *(chain.reinforced if job.reinforced else [])]
    return [*module, f"+experiment={job.experiment}", *shared, *job.overrides, *fixed]


def ready(chain: Chain, runs: Path, job: Job) -> bool:
    """Return whether the run that a job starts from is finished; True if it starts from none."""
    start = next((other for other in chain.jobs if other.name == job.start), None)
    return start is None or RunFolder(folder_of(runs, start, start.seeds[0])).finished


def run_all(chain: Chain, runs: Path, at_once: int) -> None:
    """Run all unfinished runs, up to `at_once` at the same time; if more than 1, each on one OpenMP thread.

    Raises:
        ValueError: naming the first run that fails, once the others have saved and ended.
        Stopped: after a signal, once every run has saved and ended.
    """
    waiting = [(job, seed) for job in chain.jobs for seed in job.seeds]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    environment = signals.environment() | ({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})
    try:
        _keep_running(chain, runs, at_once, waiting, running, environment)
    except (signals.Stopped, ValueError):
        with signals.held():  # each run saves a checkpoint and prints where
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
        raise


def _keep_running(
    chain: Chain, runs: Path, at_once: int, waiting: list[tuple[Job, int]],
    running: dict[tuple[str, int], subprocess.Popen[bytes]], environment: dict[str, str],
) -> None:  # fmt: skip
    """Start the waiting runs that are ready, in order, as others end, until none is left.

    `running` is kept up to date. A run that waits for another holds up none behind it.
    """
    while waiting or running:
        for key, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[key]
            if process.returncode:
                raise ValueError(
                    f"chain: the run {key[0]}, seed {key[1]}, must exit with 0; "
                    f"it exited with {process.returncode}"
                )
        for job, seed in list(waiting):
            if len(running) >= at_once:
                break
            if not ready(chain, runs, job):
                continue
            waiting.remove((job, seed))
            line = command(chain, job, seed, runs)
            if line is not None:
                print("+", " ".join(line[1:]), flush=True)
                running[job.name, seed] = subprocess.Popen(line, env=environment)
        if waiting and not running and not any(ready(chain, runs, job) for job, _ in waiting):
            raise ValueError(
                f"chain: the run {waiting[0][0].start} must write metrics.json before {waiting[0][0].name} "
                "starts from its checkpoint; it exited with 0 without that file (see what it printed)"
            )
        time.sleep(0.5)


def rows(chain: Chain, runs: Path) -> list[tuple[str, ...]]:
    """Return one row of text per run, in the order of `_COLUMNS`: its scores on its first test set.

    Raises:
        ValueError: naming a metrics.json that is missing, damaged, or lacks the scores.
    """
    found: list[tuple[str, ...]] = []
    for job in chain.jobs:
        for seed in job.seeds:
            path = RunFolder(folder_of(runs, job, seed)).metrics
            metrics = read_json(path, "chain", "test", "completions")
            try:
                score = next(iter(metrics["test"].values()))[chain.metric]
                low, high = score["interval"]
                found.append((
                    job.name, job.start or "-", str(seed), f"{metrics['completions']:,}",
                    f"{score['before']:.3f}", f"{score['after']:.3f}", f"{score['gain']:+.3f}",
                    f"[{low:+.3f}, {high:+.3f}]",
                ))  # fmt: skip
            except (KeyError, TypeError, AttributeError, StopIteration, ValueError) as error:
                said = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"chain: {path} must hold {chain.metric} of a test set before and after; "
                    f"it does not ({said})"
                ) from None
    return found


def table(chain: Chain, found: list[tuple[str, ...]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
