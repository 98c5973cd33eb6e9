"""List the samples of a dataset on disk without opening or judging them.

Loaders raise an error for unfit files; `data.check` reports them.
"""

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
    """One sample of a dataset, before any of its files is opened."""

    id: str
    image: Path
    """The image's file, or the file that holds it."""
    read: Callable[[], Sample]
    """Reads the sample at its own size; raises ValueError, naming the file, if it is unfit."""
    mask: Path | None = None
    """File of the ground truth; None if it is drawn from annotations."""
    content: Callable[[], bytes] | None = None
    """Returns the image's bytes; None if the file is the image itself."""
    size: tuple[int, int] | None = None
    """Width and height of the image in the annotations; None if they have none."""

    def sample(self) -> Sample:
        """Read the sample at its own size. Raise ValueError, naming file, row or id, if that fails."""
        with sample_of(self.id):
            return self.read()


def sample_of(name: str) -> AbstractContextManager[None]:
    """Return a context in which failures become a ValueError that names the sample; see `reading`."""
    return reading(name, "a sample that can be read is needed")


@dataclass(slots=True, kw_only=True)
class Survey:
    """All readable samples of one split, and the reasons why others cannot be listed."""

    pieces: list[Piece] = field(default_factory=list)
    without_mask: list[str] = field(default_factory=list)
    """Names of images without an annotation, or lines whose mask file is missing."""
    without_image: list[str] = field(default_factory=list)
    """Names of annotations whose image is missing, or of the missing images."""
    faults: list[str] = field(default_factory=list)
    """One line each, such as: a folder is missing, a file cannot be read, two files share a name."""
    unread: Counter[str] = field(default_factory=Counter)
    """Number of files that no loader reads, by suffix, and of "hidden" files and "sub folders"."""

    def add(self, other: Survey) -> None:
        """Add the survey of another part of the split."""
        self.pieces += other.pieces
        self.without_mask += other.without_mask
        self.without_image += other.without_image
        self.faults += other.faults
        self.unread += other.unread


class OnDisk(Dataset[Sample]):
    """Base class of datasets of files.

    A subclass has a class method `survey` with the constructor's arguments. It reports faults of
    files instead of raising an error.
    """


class Pieces(OnDisk):
    """A dataset of listed samples.

    Args:
        pieces: the samples, in order.
        side: image and mask are resized to a square of this side; None keeps their size.
    """

    def __init__(self, pieces: list[Piece], side: int | None) -> None:
        self.pieces, self.side = pieces, side

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.pieces)

    @property
    def ids(self) -> list[str]:
        """Ids of all samples, in order."""
        return [piece.id for piece in self.pieces]

    def __getitem__(self, index: int) -> Sample:
        """Read one sample, resized to `side`."""
        sample = self.pieces[index].sample()
        return sample if self.side is None else squash(sample, self.side)


def first_names(names: set[str] | list[str]) -> str:
    """Return the first five names, sorted, and the number of the others, as text."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def listed(folder: Path, suffixes: Iterable[str], unread: Counter[str], faults: list[str]) -> list[Path]:
    """Return the folder's files with one of the suffixes, sorted.

    Args:
        folder: read without its sub folders.
        suffixes: with the dot, in lower case.
        unread: its counts are increased by all other entries.
        faults: a line is appended for each name that is not UTF-8.
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
    """Return the counts as text, the most frequent first; "" if there are none."""
    return ", ".join(f"{count} {what}" for what, count in unread.most_common())
