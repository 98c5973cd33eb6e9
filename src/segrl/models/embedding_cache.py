"""A cache of a frozen encoder's image embeddings, in memory and optionally in a folder."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Embedding = list[Tensor]
"""Feature maps of one image from fine to coarse, `[C, h, w]` each; of B images `[B, C, h, w]`."""


class Embeddings:
    """The most recently used embeddings, keyed by a hash of the image's pixels and of `maker()`.

    Files appear whole or not at all, so any number of processes may share a folder. Each value of `maker()`
    has a folder of its own in it.

    Args:
        kept: number of images whose embeddings stay in memory.
        folder: keeps embeddings across epochs and runs. If None, they are kept in memory only.
        maker: returns a name for the weights, input size and precision that make the embeddings.
    """

    def __init__(self, kept: int, folder: Path | None, maker: Callable[[], str]) -> None:
        self.kept, self.folder, self.maker = kept, folder, maker
        self.device = "cpu"
        self.latest: OrderedDict[str, Embedding] = OrderedDict()

    def forget(self) -> None:
        """Drop all embeddings in memory, because the encoder has changed."""
        self.latest.clear()

    def of(self, images: Sequence[np.ndarray], make: Callable[[list[int]], Embedding]) -> Embedding:
        """Return the embeddings of B images, `[B, C, h, w]` per level.

        Args:
            images: uint8 RGB `[H, W, 3]` each.
            make: embeds the images at the given indices.
        """
        maker = self.maker()
        keys = [_key(image, maker) for image in images]
        found = {
            key: embedding
            for key in dict.fromkeys(keys)
            if (embedding := self._look_up(key, maker)) is not None
        }
        missing = [place for key, place in {key: keys.index(key) for key in keys}.items() if key not in found]
        if missing:
            made = make(missing)
            for row, place in enumerate(missing):
                # A view instead of a clone would keep the whole batch in memory.
                found[keys[place]] = [level[row].clone() for level in made]
                self._write(keys[place], maker, found[keys[place]])
        for key, embedding in found.items():
            self.latest[key] = embedding
            self.latest.move_to_end(key)
        while len(self.latest) > self.kept:
            self.latest.popitem(last=False)
        if len(missing) == len(images):
            return made
        return [torch.stack(levels) for levels in zip(*(found[key] for key in keys), strict=True)]

    def _path(self, key: str, maker: str) -> Path | None:
        return None if self.folder is None else self.folder / maker / f"{key}.safetensors"

    def _look_up(self, key: str, maker: str) -> Embedding | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(key, maker)
        if key in self.latest or path is None or not path.is_file():
            return self.latest.get(key)
        try:
            levels = load_file(path, device=self.device)
            return [levels[str(i)] for i in range(len(levels))]
        except (SafetensorError, KeyError):  # a damaged file is made again and overwritten
            return None

    def _write(self, key: str, maker: str, embedding: Embedding) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if (path := self._path(key, maker)) is None:
            return
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({str(i): level.contiguous().cpu() for i, level in enumerate(embedding)}, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:  # e.g. a full disk; the run goes on without the folder
            warnings.warn(
                f"head.embeddings_folder: nothing more is written to {self.folder}: {error}", stacklevel=2
            )
            self.folder = None


def _key(image: np.ndarray, maker: str) -> str:
    pixels = np.ascontiguousarray(image)
    return hashlib.blake2b(
        pixels.tobytes(), digest_size=16, key=f"{maker}{pixels.shape}".encode()[:64]
    ).hexdigest()


def fingerprint(weights: dict[str, Tensor], *facts: object) -> str:
    """Return a hash of weights and of other facts that determine the encoder's output."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=12)
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
