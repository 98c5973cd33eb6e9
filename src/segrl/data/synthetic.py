"""Procedural camouflage and saliency: the world of the embedded default.

Smooth shapes with a texture of their own lie on a textured ground; `contrast` says how far their colour departs
from it. A scene is a pure function of (seed, split, index): the data is unlimited, and train and held-out
scenes are disjoint by construction, because the split's name enters the random stream.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from torch.utils.data import Dataset

from segrl.types import Sample

_MIN_VISIBLE = 0.01  # an object that shows less of the image than this is drawn again
_MOST_OBJECTS = 8  # more would hardly all show


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> np.ndarray:
    """float32 `[size, cells + 2]`: rows that blend two neighbouring lattice values smoothly."""
    at = np.linspace(0, cells, size)
    low = at.astype(int)
    blend = at - low
    blend = blend * blend * (3 - 2 * blend)
    rows = np.zeros((size, cells + 2), np.float32)
    rows[np.arange(size), low] = 1 - blend
    rows[np.arange(size), low + 1] = blend
    return rows


def _texture(rng: np.random.Generator, size: int, octaves: tuple[int, ...]) -> np.ndarray:
    """Value noise float32 `[size, size]`, mean 0 and standard deviation 1."""
    total = np.zeros((size, size), np.float32)
    for cells in octaves:
        basis = _interpolation(size, cells)
        lattice = rng.standard_normal((cells + 2, cells + 2), dtype=np.float32)
        total += basis @ lattice @ basis.T / np.sqrt(cells)
    return (total - total.mean()) / (total.std() + 1e-6)


def _shape(rng: np.random.Generator, size: int) -> np.ndarray:
    """One smooth star-shaped region, bool `[size, size]`."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    cx, cy = rng.uniform(0.15, 0.85, 2)
    turn, aspect = rng.uniform(0, np.pi), rng.uniform(0.6, 1.0)
    u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    v = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / aspect
    angle = np.arctan2(v, u)
    harmonics = np.arange(1, 6)
    amplitude, phase = rng.normal(0, 0.18, 5) / harmonics, rng.uniform(0, 2 * np.pi, 5)
    radius = rng.uniform(0.12, 0.30) * (
        1 + (amplitude * np.cos(angle[..., None] * harmonics + phase)).sum(-1)
    )
    return np.hypot(u, v) < radius


def draw_scene(
    rng: np.random.Generator, size: int, contrast: tuple[float, float], objects: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        rng: consumed.
        size: side in pixels.
        contrast: range in [0, 1]; 0 camouflaged (texture and a trace of colour only), 1 salient.
        objects: fewest and most objects, inclusive.

    Returns:
        image uint8 `[size, size, 3]`, visible part of each object bool `[n, size, size]`.
    """
    base, tint = rng.uniform(0.2, 0.8, 3), rng.uniform(-0.15, 0.15, (2, 3))
    image = (
        base
        + _texture(rng, size, (4, 8, 16))[..., None] * tint[0]
        + _texture(rng, size, (6, 20))[..., None] * tint[1]
    )
    count, masks = int(rng.integers(objects[0], objects[1] + 1)), np.zeros((0, size, size), bool)
    while len(masks) < count:
        shape = _shape(rng, size)
        visible = np.concatenate([masks & ~shape, shape[None]])
        if visible.mean((1, 2)).min() < _MIN_VISIBLE:
            continue
        masks = visible
        direction = rng.standard_normal(3)
        shift = direction / np.linalg.norm(direction) * (0.08 + 0.52 * rng.uniform(*contrast))
        coat = (
            base
            + shift
            + _texture(rng, size, (10, 24))[..., None] * tint[0]
            + _texture(rng, size, (6, 20))[..., None] * tint[1]
        )
        image = np.where(shape[..., None], coat, image)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), masks


class SyntheticScenes(Dataset[Sample]):
    """`length` scenes of one split.

    Args:
        split: name of the random stream, such as "train" or "test"; different names never share a scene.
        length: number of scenes.
        seed: of the whole world.
        size, contrast, objects: see `draw_scene`.

    Raises:
        ValueError: on an empty split or a range that runs backwards.
    """

    def __init__(
        self,
        split: str,
        length: int,
        seed: int,
        size: int,
        contrast: tuple[float, float],
        objects: tuple[int, int],
    ) -> None:
        if length < 1:
            raise ValueError(f"data.{split}.length: at least 1 scene is needed; got {length}")
        if not 0 <= contrast[0] <= contrast[1] <= 1:
            raise ValueError(
                f"data.contrast: a range low <= high within [0, 1] is needed; got {list(contrast)}"
            )
        if not 1 <= objects[0] <= objects[1] <= _MOST_OBJECTS:
            raise ValueError(
                f"data.objects: a range 1 <= fewest <= most <= {_MOST_OBJECTS} is needed; got {list(objects)}"
            )
        self.split, self.length, self.seed, self.size = split, length, seed, size
        self.contrast, self.objects = (contrast[0], contrast[1]), (objects[0], objects[1])

    def __len__(self) -> int:
        """Number of scenes."""
        return self.length

    @property
    def ids(self) -> list[str]:
        """Of all scenes, in order."""
        return [self._id(index) for index in range(self.length)]

    def _id(self, index: int) -> str:
        return f"synthetic-{self.split}-{index:06d}"

    def stream(self, index: int) -> np.random.Generator:
        """The random stream of one scene."""
        return np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index])

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 `[size, size, 3]` and its objects bool `[n, size, size]`."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        return draw_scene(self.stream(index), self.size, self.contrast, self.objects)

    def __getitem__(self, index: int) -> Sample:
        """The scene as a sample: its mask is the union of its objects."""
        image, masks = self.scene(index)
        mask = np.logical_or.reduce(masks)
        return Sample(id=self._id(index), image=image, mask=mask, objects=masks)
