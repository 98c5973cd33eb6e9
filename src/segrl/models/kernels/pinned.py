"""Copy tensors from pinned host memory to a GPU: a copy from pageable memory waits for the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from segrl.models.kernels.first_use import give_up


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a host tensor on a device; to a GPU it is asynchronous if memory can be pinned."""
    if device.type != "cuda" or not _can_pin():
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


@cache
def _can_pin() -> bool:
    """Return whether memory can be pinned, tried once per process; a container may forbid it."""
    try:
        torch.zeros(1).pin_memory()
    except RuntimeError as error:
        give_up("copies to the GPU wait for it, for memory cannot be pinned", error)
        return False
    return True
