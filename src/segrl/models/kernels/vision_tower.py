"""Run a vision tower without waiting for its device: the host computes positions and windows of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segrl.models.kernels.pinned import sent
from segrl.models.kernels.suffix_attention import pass_dtype
from segrl.models.kernels.window_attention import kernel_serves
from segrl.types import Prefix


def image_features(vlm: Any, prefixes: Sequence[Prefix]) -> Any:  # noqa: ANN401 - transformers' own output
    """Return the output of transformers' `get_image_features` for the images of all prefixes.

    Args:
        vlm: a Qwen2.5-VL or Qwen3-VL of transformers, without its head.
        prefixes: their pixels are on the device of the tower, their grids on the host.
    """
    pixels = torch.cat([p.pixels for p in prefixes]).to(vlm.visual.dtype)
    kernel_serves(pixels.device, pass_dtype(vlm.visual))
    grid = torch.cat([p.grid for p in prefixes])
    layout = tower_layout(vlm.visual, grid, pixels.device)
    return vlm.get_image_features(pixels, grid, return_dict=True, **layout)


def tower_layout(tower: Any, grid: Tensor, device: torch.device) -> dict[str, Tensor | int]:
    """Return the keyword arguments of transformers' tower that it would otherwise compute from the grids.

    On a GPU the tower would synchronise with the host for each number that it reads from a grid.

    Args:
        tower: `visual` of a Qwen2.5-VL or Qwen3-VL of transformers.
        grid: int64 `[B, 3]` on the host, patches along time, height and width.
        device: of the tower, where the tensors are copied.
    """
    from transformers import vision_utils

    config, merge = tower.config, tower.config.spatial_merge_size
    ends = vision_utils.get_vision_cu_seqlens(grid)
    laid = {"position_ids": vision_utils.get_vision_position_ids(grid, merge), "cu_seqlens": ends}
    most = {"max_seqlen": int(ends.diff().max())}
    if config.model_type.startswith("qwen2_5"):
        index, window_ends = vision_utils.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=config.window_size, patch_size=config.patch_size
        )
        laid |= {"window_index": index, "cu_window_seqlens": window_ends}
        most["max_window_seqlen"] = int(window_ends.diff().max())
    else:
        places, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=tower.num_grid_per_side, mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners, spatial_merge_size=merge,
        )  # fmt: skip
        laid |= {"interp_indices": places, "interp_weights": weights}
    return {**{name: sent(value, device) for name, value in laid.items()}, **most}


def rotary_positions(token_types: Tensor, grid: Tensor, merge: int) -> Tensor:
    """Return rotary positions int64 `[3, P]` (time, height, width) of a prefix with one image.

    Each text token advances all three axes by one. The image's tokens have the coordinates of their grid,
    offset by the number of tokens before the image. The text after the image continues from the image's
    largest position plus one.

    Args:
        token_types: int64 `[P]`, 1 on image tokens.
        grid: int64 `[1, 3]`, patches along time, height and width.
        merge: a token covers `merge` x `merge` patches.
    """
    pictured = (token_types == 1).nonzero()[:, 0]
    _, height, width = grid[0].tolist()
    rows, columns = height // merge, width // merge
    first, count = int(pictured[0]), len(pictured)
    places = torch.arange(count)
    image = torch.stack([torch.zeros_like(places), places // columns, places % columns])
    behind = torch.arange(len(token_types) - first - count) + max(rows, columns)
    return torch.cat([torch.arange(first).expand(3, -1), first + image, first + behind.expand(3, -1)], 1)
