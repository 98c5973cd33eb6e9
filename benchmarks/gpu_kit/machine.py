"""Versions, what the card says of itself, and its speeds."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import floor
import torch
from torch.nn.attention.varlen import varlen_attn

from gpu_kit.findings import Findings

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "lightning", "sam2", "hydra-core", "pydantic",
    "numpy", "trl", "datasets", "pyarrow", "deepspeed", "vllm",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _commit() -> str:
    """Return the commit of the code, as git has it or as `gpu_wheels.sh` wrote it down beside the wheels."""
    here = Path(__file__).resolve().parents[2]
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        written = here / ".whl" / "commit"
        return " ".join(written.read_text().split()) if written.is_file() else "unknown"


def machine(findings: Findings, device: torch.device, rehearse: bool) -> None:
    """Say what is installed and what the card is; `rehearse` leaves out its speeds."""
    findings.say(name="code", commit=_commit(), date=time.strftime("%Y-%m-%d"), rehearsal=rehearse)
    findings.say(
        name="versions",
        python=sys.version.split()[0],
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        **{package: _version(package) for package in PACKAGES},
    )
    findings.say(name="varlen_attn", signature=str(inspect.signature(varlen_attn)))
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        findings.say(
            name="card", card=card.name, capability=f"{card.major}.{card.minor}",
            multiprocessors=card.multi_processor_count, free_gb=round(free / 1e9, 1),
            total_gb=round(total / 1e9, 1), cores=os.cpu_count(),
        )  # fmt: skip
    if not rehearse:
        speed = floor.speeds(device.type)
        findings.say(
            name="speeds", tflops=round(speed.operations / 1e12), tb_per_s=round(speed.bytes / 1e12, 2)
        )
