"""Copies from the host to a GPU, out of pinned memory: from other memory a copy waits for the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from segrl.models.kernels.first_use import give_up


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; a GPU copies it while the host goes on."""
    if device.type != "cuda" or not _can_pin():
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


@cache
def _can_pin() -> bool:
    """Try once in a process; a container may forbid memory that cannot be swapped out."""
    try:
        torch.zeros(1).pin_memory()
    except RuntimeError as error:
        give_up("copies to the GPU wait for it, for memory cannot be pinned", error)
        return False
    return True
