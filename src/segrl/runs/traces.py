"""Write chat traces from images and masks, for `segrl.prepare traces`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from omegaconf import DictConfig, OmegaConf

from segrl.host import signals
from segrl.host.files import lock, write_whole
from segrl.runs.configuration import check as check_all
from segrl.runs.configuration import check_keys

if TYPE_CHECKING:
    from segrl.data.annotator import Judged


def traces(cfg: DictConfig) -> None:
    """Write one line of JSON for each sample whose mask the mask head draws from the trace's own mask prompt.

    A sample is kept if the IoU of the two masks is at least `least_iou`. Judged samples are kept in
    `OUT.partial`, so that the same command resumes after a stop.

    Raises:
        ValueError: if `out` cannot be written, or no sample is kept.
        Stopped: after a signal, once the current sample is written.
    """
    check_keys(cfg, "prepare_traces")
    out = _checked_out(cfg)
    check_all(cfg, "prepare_traces")
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from segrl.data.annotator import Judged, written

    head_name = f"head={HydraConfig.get().runtime.choices['head']}"
    samples, head = instantiate(cfg.data.module.train), instantiate(cfg.head)
    partial, judged = out.with_name(f"{out.name}.partial"), Judged()
    with signals.held(), _going_on(partial, _command(cfg, samples.ids), judged) as file:
        if judged.seen:
            print(f"  {judged.seen}/{len(samples)} were judged before", flush=True)
        grammar, annotator = instantiate(cfg.grammar), instantiate(cfg.annotator)
        for one in written(samples, head, grammar, annotator, cfg.least_iou, judged):
            if isinstance(one, dict):
                one |= {"image": os.path.relpath(one["image"], out.parent)}
            file.write(json.dumps(one) + "\n")
            file.flush()
            judged.add(one)
            if judged.seen % 100 == 0:
                print(f"  {judged.seen}/{len(samples)}, {len(judged.lines)} kept", flush=True)
            if (signum := signals.asked()) is not None:
                stop = signals.Stopped(signum)
                said = f"{judged.seen} of {len(samples)} samples are judged and saved in {partial}"
                print(f"stopped by {stop.name}; {said}; the same command continues", flush=True)
                stop.told = True
                raise stop
        left_out = (
            f"{judged.unsolved} below IoU {cfg.least_iou} with {head_name}, {judged.empty} without an object"
        )
        if not judged.lines:
            raise ValueError(
                f"least_iou: must be reached by at least one of {len(samples)} samples; "
                f"none reached it ({left_out}) (lower it, or use another head)"
            )
        write_whole(out, "".join(json.dumps(line) + "\n" for line in judged.lines))
        partial.unlink()
        print(f"{len(judged.lines)} traces in {out}; left out: {left_out}")
    signals.check()


def _command(cfg: DictConfig, ids: Sequence[str]) -> str:
    """Return the first line of a partial file: a digest of the settings and of the samples' ids."""
    parts = {
        part: OmegaConf.to_container(cfg[part], resolve=True)
        for part in ("data", "head", "grammar", "annotator")
    }
    said = json.dumps([parts, cfg.least_iou, str(cfg.out), list(ids)])
    return f"traces {hashlib.sha256(said.encode()).hexdigest()}"


@contextmanager
def _going_on(partial: Path, command: str, judged: Judged) -> Iterator[TextIO]:
    """Add the lines of a partial file to `judged`, and open it to append to.

    The file is locked for this process. A ValueError before the first trace deletes the file and the folders
    that were created for it.

    Args:
        partial: path of the file; created with its folders if it does not exist.
        command: its first line.
        judged: counts the samples.

    Raises:
        ValueError: if another process writes the file, or it belongs to another command or is damaged.
    """
    made = [folder for folder in partial.parents if not folder.exists()]
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a") as text:
        if lock(text.fileno()) is False:
            raise ValueError(f"out: {partial} must be free; another process writes it: wait for its end")
        _take_over(partial, text, command, judged)
        try:
            yield text
        except ValueError:
            if judged.lines:  # keep what was found before a sample that cannot be read
                raise
            partial.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
            raise


def _take_over(partial: Path, text: TextIO, command: str, judged: Judged) -> None:
    """Add the lines of a partial file to `judged`, and cut an incomplete last line off; or begin the file.

    Raises:
        ValueError: if the file belongs to another command or is damaged.
    """
    whole = partial.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]  # an incomplete last line is judged again
    first, *rows = whole.decode(errors="replace").splitlines() or [command]
    try:
        for row in rows:
            judged.add(json.loads(row))
    except ValueError:
        first = ""
    if first != command:
        raise ValueError(
            f"out: {partial} must be of the same command; it is of another, or was changed "
            "(repeat the command that wrote it, or delete the file to start again)"
        )
    os.truncate(partial, len(whole))
    if not whole:
        text.write(f"{command}\n")
        text.flush()


def _checked_out(cfg: DictConfig) -> Path:
    """Return the file to write. Raise ValueError if it is no .jsonl file, or exists without `overwrite`."""
    out = Path(str(cfg.out))
    if out.suffix != ".jsonl" or out.is_dir():
        raise ValueError(f"out: must be a .jsonl file; got {out}")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"out: must be a new .jsonl file; {out} exists (overwrite=true replaces it)")
    return out
