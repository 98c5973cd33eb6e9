"""`python -m segrl.export ckpt=CHECKPOINT out=FOLDER`: write a trained policy as a Hugging Face folder.

The folder has a model card. Any tool that reads this format loads it. `Segmenter.from_pretrained` and
`segrl.evaluate model=FOLDER` also read grammar and mask head from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from segrl.host.signals import Stopped, held
from segrl.runs.command import enter
from segrl.runs.configuration import check
from segrl.runs.export import export_policy


def job(cfg: DictConfig) -> None:
    """Export a policy, and print where it is.

    Raises:
        ValueError: if `out` is not a new or empty folder, or `ckpt` holds no policy of a run.
        Stopped: after a signal, once the unfinished folder is deleted.
    """
    check(cfg, "export")
    # Absolute, because the run folder is found by its parents, also for a bare `last.ckpt`.
    ckpt, out = Path(cfg.ckpt).absolute(), Path(cfg.out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"out: must be a new or an empty folder; {out} exists")
    try:
        export_policy(ckpt, out, "A policy that writes mask prompts for a promptable segmenter.")
    except Stopped:
        with held():
            shutil.rmtree(out, ignore_errors=True)
        raise
    print(
        f"written to {out}: Segmenter.from_pretrained({str(out)!r}), or make eval MODEL={out} SUITE=synthetic"
    )


def main() -> None:
    """Run the command line."""
    enter("export", job)


if __name__ == "__main__":
    main()
