"""What a dataset on the disk is made of, listed and not judged: loaders refuse what is unfit, `data.check` reports it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset

from segrl.data.boundary import is_text, reading
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

    def sample(self) -> Sample:
        """Read the sample at its own size. Raises ValueError naming file, row or id, whatever a library raises."""
        with sample_of(self.id):
            return self.read()


def sample_of(name: str) -> AbstractContextManager[None]:
    """Inside, whatever spoils a sample is a ValueError that names it, or its file."""
    return reading(name, "a sample that can be read is needed")


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
    unread: Counter[str] = field(default_factory=Counter)
    """Number of files that no loader reads, by suffix, and of "hidden" files and "sub folders"."""

    def add(self, other: Survey) -> None:
        """Take over what another part of the split holds."""
        self.pieces += other.pieces
        self.without_mask += other.without_mask
        self.without_image += other.without_image
        self.faults += other.faults
        self.unread += other.unread


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
        sample = self.pieces[index].sample()
        return sample if self.side is None else squash(sample, self.side)


def first_names(names: set[str] | list[str]) -> str:
    """The first five, and how many more there are."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def listed(folder: Path, suffixes: Iterable[str], unread: Counter[str], faults: list[str]) -> list[Path]:
    """Return the folder's files of those suffixes, in order.

    Args:
        folder: read flat.
        suffixes: in lower case.
        unread: counts what else there is.
        faults: is told of names that are no text.
    """
    taken, files = frozenset(suffixes), []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            unread["hidden"] += 1
        elif path.is_dir():
            unread["sub folders"] += 1
        elif path.suffix.lower() not in taken:
            unread[path.suffix.lower() or "no suffix"] += 1
        elif not is_text(path.name):
            faults.append(f"{folder}: file names in UTF-8 are needed; got {path.name!a}")
        else:
            files.append(path)
    return files


def counted(unread: Counter[str]) -> str:
    """Return the counts in words, the most frequent first; empty where nothing was left."""
    return ", ".join(f"{count} {what}" for what, count in unread.most_common())
