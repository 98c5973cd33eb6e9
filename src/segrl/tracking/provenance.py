"""Where a number comes from: code, configuration, versions, machine."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _git(*arguments: str) -> str:
    """Output of git in the checkout that this file lies in; empty outside of one."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def command() -> str:
    """Return the command line that repeats this run: of a sweep's job, that of the job alone."""
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    words = sys.argv[1:]
    module = f"segrl.{Path(sys.argv[0]).stem.removeprefix('segrl-')}"
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        said = get_args_parser().parse_args(words)
        elsewhere = [] if said.config_dir is None else ["--config-dir", said.config_dir]
        words = [*elsewhere, *HydraConfig.get().overrides.task]
    return " ".join(["python -m", module, *(shlex.quote(word) for word in words)])


def _version(package: str) -> str:
    """Return the version of an installed package; a checkout on the path has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def provenance(config_yaml: str) -> dict[str, str]:
    """Return the tags of a run: command, commit, whether the tree differs from it, hash of the configuration, versions."""
    packages = ("segrl", "torch", "transformers", "lightning", "sam2")
    return {
        "command": command(),
        "git.commit": _git("rev-parse", "HEAD") or "unknown",
        "git.dirty": str(bool(_git("status", "--porcelain"))).lower(),
        "config.sha256": hashlib.sha256(config_yaml.encode()).hexdigest(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{f"version.{name}": _version(name) for name in packages},
    }
