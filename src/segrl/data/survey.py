"""What a dataset on the disk is made of, listed and not judged: loaders refuse what is unfit, `data.check` reports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset

from segrl.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One sample, before any of its files is opened."""

    id: str
    image: Path
    """Its file, or the file that it is stored in."""
    read: Callable[[], Sample]
    """The sample at its own size; ValueError naming the file that is unfit."""
    mask: Path | None = None
    """File of the ground truth; none where it is drawn from annotations."""
    content: Callable[[], bytes] | None = None
    """The image's bytes; none where the file is nothing but the image."""
    size: tuple[int, int] | None = None
    """Width and height that the annotations claim for the image; none where they claim nothing."""


@dataclass(slots=True, kw_only=True)
class Survey:
    """All samples of one split, and what stands in the way of others."""

    pieces: list[Piece] = field(default_factory=list)
    without_mask: list[str] = field(default_factory=list)
    """Images that no annotation belongs to."""
    without_image: list[str] = field(default_factory=list)
    """Annotations whose image is not there."""
    faults: list[str] = field(default_factory=list)
    """One line each: a folder that is missing, a file that cannot be read, two files of one name."""

    def add(self, other: Survey) -> None:
        """Take over what another part of the split holds."""
        self.pieces += other.pieces
        self.without_mask += other.without_mask
        self.without_image += other.without_image
        self.faults += other.faults


class OnDisk(Dataset[Sample]):
    """A dataset of files. Its `survey` takes what its constructor takes, and refuses nothing that is a matter of files."""


def first_names(names: set[str] | list[str]) -> str:
    """The first five, and how many more there are."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
