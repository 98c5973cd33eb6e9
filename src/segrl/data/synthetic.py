"""Generate scenes of camouflaged and salient objects: the data of the default configuration.

Smooth shapes with their own texture lie on a textured background; `contrast` sets the difference of their
colours. A scene is a pure function of (seed, split, index), so the number of scenes is unlimited. The splits
have different random streams, because a stream is seeded with the split's name, too.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from torch.utils.data import Dataset

from segrl.types import Sample

_MIN_VISIBLE = 0.01  # smallest visible share of the image; a shape that leaves any object less is drawn again
_MOST_OBJECTS = 8  # more would rarely all be visible


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> np.ndarray:
    """Return float32 `[size, cells + 2]`, whose rows blend two neighbouring lattice values by smoothstep."""
    at = np.linspace(0, cells, size)
    low = at.astype(int)
    blend = at - low
    blend = blend * blend * (3 - 2 * blend)
    rows = np.zeros((size, cells + 2), np.float32)
    rows[np.arange(size), low] = 1 - blend
    rows[np.arange(size), low + 1] = blend
    return rows


def _texture(rng: np.random.Generator, size: int, octaves: tuple[int, ...]) -> np.ndarray:
    """Return value noise, float32 `[size, size]`, with mean 0 and standard deviation 1."""
    total = np.zeros((size, size), np.float32)
    for cells in octaves:
        basis = _interpolation(size, cells)
        lattice = rng.standard_normal((cells + 2, cells + 2), dtype=np.float32)
        total += basis @ lattice @ basis.T / np.sqrt(cells)
    return (total - total.mean()) / (total.std() + 1e-6)


def _shape(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random smooth star-shaped region, bool `[size, size]`; the image's edge may cut it off."""
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
        rng: the random stream; it is advanced.
        size: side in pixels.
        contrast: range of each object's contrast, in [0, 1]: 0 is camouflaged (another texture and a small
            shift of colour), 1 is salient.
        objects: smallest and largest number of objects, inclusive.

    Returns:
        The image uint8 `[size, size, 3]` and the visible part of each object, bool `[n, size, size]`.
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
    """A dataset of `length` scenes of one split.

    Args:
        split: name of the split, such as "train" or "test"; different names have different random streams.
        length: number of scenes.
        seed: seed of all splits.
        size, contrast, objects: see `draw_scene`.

    Raises:
        ValueError: if `length` is below 1, or a range is reversed or out of bounds.
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
            raise ValueError(f"data.{split}.length: must be at least 1; got {length}")
        if not 0 <= contrast[0] <= contrast[1] <= 1:
            raise ValueError(
                f"data.contrast: must be a range low <= high within [0, 1]; got {list(contrast)}"
            )
        if not 1 <= objects[0] <= objects[1] <= _MOST_OBJECTS:
            raise ValueError(
                f"data.objects: must be a range 1 <= fewest <= most <= {_MOST_OBJECTS}; got {list(objects)}"
            )
        self.split, self.length, self.seed, self.size = split, length, seed, size
        self.contrast, self.objects = (contrast[0], contrast[1]), (objects[0], objects[1])

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.length

    @property
    def ids(self) -> list[str]:
        """Ids of all scenes, in order."""
        return [self._id(index) for index in range(self.length)]

    def _id(self, index: int) -> str:
        return f"synthetic-{self.split}-{index:06d}"

    def stream(self, index: int) -> np.random.Generator:
        """Return the random stream of one scene."""
        return np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index])

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the image uint8 `[size, size, 3]` and its objects bool `[n, size, size]` of one scene."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        return draw_scene(self.stream(index), self.size, self.contrast, self.objects)

    def __getitem__(self, index: int) -> Sample:
        """Return a scene as a sample, whose mask is the union of its objects."""
        image, masks = self.scene(index)
        mask = np.logical_or.reduce(masks)
        return Sample(id=self._id(index), image=image, mask=mask, objects=masks)
