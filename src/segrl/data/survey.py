"""List the items of a dataset on disk without opening an image, and read them later.

Loaders raise an error for unfit files; `data.check` reports them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from unicodedata import normalize

from torch.utils.data import Dataset

from segrl.data.boundary import is_text, reading
from segrl.data.transforms import squash
from segrl.types import Sample

READABLE = "must be a sample that can be read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One sample of a dataset before its files are opened."""

    id: str
    image: Path
    """The image's file, or the file that holds it."""
    read: Callable[[], Sample]
    """Reads the sample at its own size; raises ValueError, naming the file, if it is unfit."""
    check: Callable[[], None] | None = None
    """Raises ValueError, naming the file, if the files' headers are unfit; None if only `read` can tell."""
    mask: Path | None = None
    """File of the ground truth; None if it is drawn from annotations."""
    content: Callable[[], bytes] | None = None
    """Returns the image's bytes; None if the file is the image itself."""
    size: tuple[int, int] | None = None
    """Width and height of the image in the annotations; None if they have none."""

    def sample(self) -> Sample:
        """Read the sample at its own size. Raise ValueError, naming file, row or id, if that fails."""
        with reading(self.id, READABLE):
            return self.read()


@dataclass(slots=True, kw_only=True)
class Survey:
    """All readable items of one split, and the reasons why others cannot be listed."""

    items: list[Item] = field(default_factory=list)
    without_mask: list[str] = field(default_factory=list)
    """Names of images without an annotation, or lines whose mask file is missing."""
    without_image: list[str] = field(default_factory=list)
    """Names of annotations whose image is missing, or of the missing images."""
    faults: list[str] = field(default_factory=list)
    """One line each, such as: a folder is missing, a file cannot be read, two files share a name."""
    gaps: list[str] = field(default_factory=list)
    """One line for each folder or file whose names are in `without_mask` or `without_image`; see `close`."""
    unread: Counter[str] = field(default_factory=Counter)
    """Number of files that no loader reads, by suffix, and of "hidden" files and "sub folders"."""

    def close(self, *, mask: str = "", image: str = "", empty: str) -> Survey:
        """Write the lines of `gaps`, add a fault if nothing at all was found, and return the survey.

        Args:
            mask: the rule that the names in `without_mask` break; their line begins with it.
            image: likewise for `without_image`.
            empty: the fault of a split without items.
        """
        left = not_read(self.unread)
        for needed, names in ((mask, self.without_mask), (image, self.without_image)):
            if names:
                self.gaps.append(f"{needed}; there is none for {first_names(names)}{left}")
        if not (self.items or self.faults or self.gaps):
            self.faults.append(f"{empty}{left}")
        return self

    def add(self, other: Survey) -> None:
        """Add the survey of another part of the split."""
        self.items += other.items
        self.without_mask += other.without_mask
        self.without_image += other.without_image
        self.faults += other.faults
        self.gaps += other.gaps
        self.unread += other.unread

    def refuse_faults(self) -> None:
        """Raise ValueError with the first fault or, if there is none, with the first gap."""
        for line in (*self.faults, *self.gaps):
            raise ValueError(line)


class ItemDataset(Dataset[Sample]):
    """A dataset of files: base class of all loaders.

    A subclass has a class method `survey` with the constructor's arguments. It lists the items, opens no
    image, and returns faults of files instead of raising them. The constructor passes that survey on to this
    one, so a dataset is enumerated in one place.

    Args:
        survey: the items, in order, and the faults.
        side: image and mask are resized to a square of this side; None keeps their size.

    Raises:
        ValueError: if the survey has a fault, or the check of an item finds a file unfit. On access: if a
            file is found unfit only when it is decoded.
    """

    whole_split: ClassVar[Mapping[str, object]] = {}
    """Arguments with which `survey` lists every item of a split that its owners count."""

    def __init__(self, survey: Survey, side: int | None) -> None:
        survey.refuse_faults()
        for item in survey.items:
            if item.check is not None:
                item.check()
        self.items, self.side = survey.items, side

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.items)

    @property
    def ids(self) -> list[str]:
        """Ids of all items, in order."""
        return [item.id for item in self.items]

    def __getitem__(self, index: int) -> Sample:
        """Read one sample, resized to `side`."""
        sample = self.items[index].sample()
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
            faults.append(f"{folder}: file names must be UTF-8; got {path.name!a}")
        else:
            files.append(path)
    return files


def by_stem(files: Iterable[Path], faults: list[str]) -> dict[str, Path]:
    """Return the files by stem (in NFC); a line is appended to `faults` for each second file of a stem."""
    found: dict[str, Path] = {}
    for path in files:
        stem = normalize("NFC", path.stem)
        if stem in found:
            faults.append(f"{path.parent}: names must be unique; got {found[stem].name} and {path.name}")
        found[stem] = path
    return found


def counted(unread: Counter[str]) -> str:
    """Return the counts as text, the most frequent first; "" if there are none."""
    return ", ".join(f"{count} {what}" for what, count in unread.most_common())


def not_read(unread: Counter[str]) -> str:
    """Return " (not read: ...)" with the counts, to end an error message; "" if there are none."""
    return f" (not read: {counted(unread)})" if unread else ""
