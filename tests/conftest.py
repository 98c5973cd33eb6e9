"""Fixtures of all tests: one thread, shapes checked at run time, and the real data where it is present."""

from __future__ import annotations

import os
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Before the pure rooms are imported: the shapes in their signatures become checks, in tests only.
jaxtyping.install_import_hook(["segrl.objectives", "segrl.metrics.functional"], "beartype.beartype")

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, derandomize=True, max_examples=80)
settings.load_profile("house")


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="run the tests marked gpu on the CPU")


@pytest.fixture(scope="session")
def gpu(request) -> torch.device:
    """Return the device of a test marked `gpu`."""
    if request.config.getoption("--rehearse"):
        return torch.device("cpu")
    assert torch.cuda.is_available(), "no GPU is seen; --rehearse runs these tests on the CPU"
    return torch.device("cuda")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Return the folder of photographs, masks and published scores.

    It is $SEGRL_REALDATA, or shared/realdata next to the repository.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "realdata"
    folder = Path(os.environ.get("SEGRL_REALDATA", beside))
    if not folder.is_dir():
        pytest.skip("real data is not here; SEGRL_REALDATA names its folder")
    return folder


@pytest.fixture(scope="session")
def nano_weights(tmp_path_factory):
    """Return, by family, an untrained nano checkpoint on the disk, in the format of the real ones."""
    from segrl.nano import architecture

    made: dict[str, Path] = {}

    def weights(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            texts = architecture.vocabulary_texts(
                ["Segment the object."] * 4, ["<think> </think> <bbox>[1,2,3,4]</bbox>"] * 4
            )
            made[family] = architecture.write(
                tmp_path_factory.mktemp(family), getattr(architecture, family)(texts)
            )
        return made[family]

    return weights


@pytest.fixture(scope="session")
def nano_policy(nano_weights):
    """Return, by family, an untrained policy, loaded by the adapter that loads the real ones."""
    from segrl.models.hf_vlm import HFPolicy

    made: dict[str, HFPolicy] = {}

    def policy(family: str) -> HFPolicy:
        if family not in made:
            side = {"qwen3_vl": 128, "qwen2_5_vl": 112}[family]
            made[family] = HFPolicy(str(nano_weights(family)), side, None, 1.0, "float32", None, True, False)
        return made[family]

    return policy


@pytest.fixture
def nano_head():
    """Return the trained nano SAM 2 that ships with the package."""
    from segrl.models.sam2_head import Sam2Head
    from segrl.runs.configuration import asset

    return Sam2Head(asset("sam2_nano.yaml"), asset("sam2_nano.safetensors"), 256, 8, None)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Return a function that runs the real command line in this process.

    It maps arguments to (exit code, stdout, stderr). Runs go under tmp_path.
    """
    import sys

    def run(
        *arguments: str, module: str = "train", runs: Path | None = tmp_path / "runs", cwd: Path = tmp_path
    ) -> tuple[int, str, str]:
        import importlib

        where = [] if runs is None else [f"paths.runs={runs}"]
        monkeypatch.setattr(sys, "argv", ["segrl", *arguments, *where])
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        code = 0
        try:
            importlib.import_module(f"segrl.{module}").main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
