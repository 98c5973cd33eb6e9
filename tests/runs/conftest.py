"""Fixtures: evaluations through the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def layouts() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "layouts", Path(__file__).parents[1] / "data" / "layouts.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evaluate(cli, tmp_path):
    """Return a function from arguments to the folder of an evaluation that succeeded."""

    def run(name: str, *arguments: str) -> Path:
        code, _, err = cli(*arguments, f"paths.run={tmp_path / name}", module="evaluate")
        assert code == 0, err
        return tmp_path / name

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Return a function from arguments to the one line that refuses them.

    It checks that nothing was written.
    """

    def run(*arguments: str, runs: Path | None = tmp_path / "runs") -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = cli(*arguments, module="evaluate", runs=runs)
        assert code == 2, (code, out, err)
        (line,) = err.splitlines()
        assert line.startswith("segrl: ") and sorted(tmp_path.rglob("*")) == before
        return line

    return run
