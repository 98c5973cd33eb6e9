"""Provenance of a run: command, code, configuration, versions, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

JOB_OVERRIDES = "SEGRL_JOB_OVERRIDES"
"""Environment variable with the overrides of a sweep's job, as JSON, while the job runs."""


def _git(*arguments: str) -> str:
    """Return the output of git in this file's folder; an empty string if git fails."""
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
    """Return the command line that repeats this run; in a sweep, that of the current job."""
    words = sys.argv[1:]
    module = f"segrl.{Path(sys.argv[0]).stem.removeprefix('segrl-')}"
    if JOB_OVERRIDES in os.environ:
        flags = ("--config-dir", "-cd")
        elsewhere = [
            words[i : i + 2] if word in flags else [word]
            for i, word in enumerate(words)
            if word.startswith(flags)
        ]
        words = [*(word for some in elsewhere for word in some), *json.loads(os.environ[JOB_OVERRIDES])]
    return " ".join(["python -m", module, *(shlex.quote(word) for word in words)])


def _version(package: str) -> str:
    """Return the version of an installed package, or "not installed", as for a checkout on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def provenance(config_yaml: str) -> dict[str, str]:
    """Return a run's tags: command, commit and whether files differ from it, configuration hash, versions."""
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
