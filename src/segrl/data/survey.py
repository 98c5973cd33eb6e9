"""What a dataset on the disk is made of, listed and not judged: loaders refuse what is unfit, `data.check` reports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset

from segrl.data.transforms import squash
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


class Pieces(OnDisk):
    """One sample per piece.

    Args:
        pieces: in order.
        side: resize to this square, image and mask together; none leaves them as they are.
    """

    def __init__(self, pieces: list[Piece], side: int | None) -> None:
        self.pieces, self.side = pieces, side

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.pieces)

    @property
    def ids(self) -> list[str]:
        """Of all samples, in order."""
        return [piece.id for piece in self.pieces]

    def __getitem__(self, index: int) -> Sample:
        """Read one."""
        sample = self.pieces[index].read()
        return sample if self.side is None else squash(sample, self.side)


def first_names(names: set[str] | list[str]) -> str:
    """The first five, and how many more there are."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
