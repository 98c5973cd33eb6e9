"""Read datasets that are folders of images and folders of masks, paired by the stem of the file name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

from pydantic import BaseModel, ConfigDict, ValidationError

from segrl.data.pictures import SUFFIXES
from segrl.data.survey import OnDisk, Piece, Survey, counted, first_names, listed, sample_of
from segrl.data.transforms import MaskRule, check_pair, read_pair, squash
from segrl.types import Sample


class FolderPair(BaseModel):
    """One entry of `folders` in a dataset's YAML."""

    model_config = ConfigDict(extra="forbid")
    images: str
    """Folder of images, relative to the root, without its sub folders."""
    masks: str
    """Folder of masks, read likewise; may be the same folder if `mask_suffix` distinguishes the files."""
    keep: str = ""
    """Only files whose stem contains this are used."""
    only_with_image: bool = False
    """Ignore masks without an image: they belong to another split (CAMO has one mask folder)."""
    mask_suffix: str = ""
    """Suffix of a mask's stem after its image's stem, such as _mask."""
    objects: Sequence[int] | None = None
    """Values of a mask (indices, in a palette file) that are the object; all others are background."""
    background: Sequence[int] | None = None
    """Values of a mask that are background; all others are the object."""
    resize_masks: bool = False
    """Resize a mask to its image's size if their aspect ratios differ by less than 1 %."""

    @classmethod
    def of(cls, place: int, given: Mapping[str, object]) -> FolderPair:
        """Return the validated entry number `place`. Raise ValueError, naming the key, if one is wrong."""
        try:
            one = cls.model_validate(dict(given))
        except ValidationError as error:
            found = error.errors()[0]
            key = ".".join(map(str, (f"folders[{place}]", *found["loc"])))
            if found["type"] == "extra_forbidden":
                raise ValueError(
                    f"{key}: there is no such key (there are: {', '.join(cls.model_fields)})"
                ) from None
            raise ValueError(f"{key}: {found['msg'].lower()}; got {found['input']!r}") from None
        if one.objects is not None and one.background is not None:
            raise ValueError(f"folders[{place}].background: objects or background is needed, not both")
        return one

    @property
    def rule(self) -> MaskRule:
        """Rule by which the masks are read."""
        return MaskRule(
            objects=None if self.objects is None else tuple(self.objects),
            background=None if self.background is None else tuple(self.background),
            resize=self.resize_masks,
        )


@dataclass(slots=True, kw_only=True)
class Pairing:
    """Contents of two folders: the pairs in order, and the stems without a partner."""

    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    without_mask: set[str] = field(default_factory=set)
    without_image: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Number of files that are not read, by suffix, and of "hidden" files and "sub folders"."""


def _left(unread: Counter[str]) -> str:
    """Return " (not read: ...)" with the counts, to end an error message; "" if there are none."""
    return f" (not read: {counted(unread)})" if unread else ""


def _files(folder: Path, keep: str, faults: list[str], unread: Counter[str]) -> dict[str, Path]:
    """Return the files by stem (in NFC), if the stem contains `keep`; two files with one stem are a fault."""
    found: dict[str, Path] = {}
    for path in listed(folder, SUFFIXES, unread, faults):
        stem = normalize("NFC", path.stem)
        if normalize("NFC", keep) not in stem:
            continue
        if stem in found:
            faults.append(f"{folder}: one file per name is needed; got {found[stem].name} and {path.name}")
        found[stem] = path
    return found


def pairing(
    images: Path, masks: Path, keep: str, only_with_image: bool = False, mask_suffix: str = ""
) -> Pairing:
    """Return pairs and faults of one folder pair, without raising an error. Arguments as in `FolderPair`."""
    found = Pairing()
    for folder in (images, masks):
        if not folder.is_dir():
            found.faults.append(
                f"data: a folder is needed; there is no {folder} (set data.root, or the root of the test set)"
            )
    if found.faults:
        return found
    pictures = _files(images, keep, found.faults, found.unread)
    truths = pictures if images == masks else _files(masks, keep, found.faults, found.unread)
    if mask_suffix:
        mask_suffix = normalize("NFC", mask_suffix)
        truths = {s.removesuffix(mask_suffix): path for s, path in truths.items() if s.endswith(mask_suffix)}
        if images == masks:
            pictures = {s: path for s, path in pictures.items() if not s.endswith(mask_suffix)}
    found.pairs = [(path, truths[stem]) for stem, path in pictures.items() if stem in truths]
    found.without_mask = set(pictures) - set(truths)
    found.without_image = set() if only_with_image else set(truths) - set(pictures)
    return found


def pair(
    images: Path, masks: Path, keep: str, only_with_image: bool = False, mask_suffix: str = ""
) -> list[tuple[Path, Path]]:
    """Return the (image, mask) pairs of two folders. Arguments as in `FolderPair`.

    Raises:
        ValueError: if a folder is missing, there is no pair, two files have one stem, or files lack a
            partner. The message names at most five of these.
    """
    found = pairing(images, masks, keep, only_with_image, mask_suffix)
    if found.faults:
        raise ValueError(found.faults[0])
    if found.without_mask:
        raise ValueError(
            f"{masks}: a mask for every image is needed; there is none for {first_names(found.without_mask)}"
            f"{_left(found.unread)}"
        )
    if found.without_image:
        raise ValueError(
            f"{images}: an image for every mask is needed; "
            f"there is none for {first_names(found.without_image)}"
            f"{_left(found.unread)}"
        )
    if not found.pairs:
        raise ValueError(
            f"{images}: at least one image is needed; the folder holds none"
            + (f" named *{keep}*" if keep else "")
            + _left(found.unread)
        )
    return found.pairs


def _deeper(key: str, folder: Path) -> str:
    """Return a hint at the first sub folder with images, to end an error message; "" if there is none."""
    held = [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    ]
    return f"; sub folders are not read: did you mean {key}={held[0]}?" if held else ""


def pair_maps(predictions: Path, truths: Path, keep: str) -> list[tuple[Path, Path]]:
    """Return the (map, ground truth) pairs of two folders, by stem; only stems that contain `keep` are used.

    Raises:
        ValueError: if a folder is missing, there is no ground truth, two files have one stem, or files lack a
            partner. The message names at most five of these.
    """
    for key, folder in (("pred", predictions), ("gt", truths)):
        if not folder.is_dir():
            raise ValueError(f"{key}: a folder is needed; there is no {folder}")
    faults: list[str] = []
    unread: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    maps, masks = (
        _files(folder, keep, faults, left) for folder, left in zip((predictions, truths), unread, strict=True)
    )
    if faults:
        raise ValueError(faults[0])
    if alone := set(masks) - set(maps):
        raise ValueError(
            f"pred: a map for every ground truth is needed; there is none for {first_names(alone)}"
            f"{_deeper('pred', predictions)}{_left(unread[0])}"
        )
    if alone := set(maps) - set(masks):
        raise ValueError(
            f"gt: a ground truth for every map is needed; there is none for {first_names(alone)}"
            f"{_deeper('gt', truths)}{_left(unread[1])}"
        )
    if not masks:
        raise ValueError(
            f"gt: at least one mask is needed; {truths} holds none"
            + f" named *{keep}*" * bool(keep)
            + f"{_deeper('gt', truths)}{_left(unread[1])}"
        )
    return [(maps[stem], masks[stem]) for stem in masks]


class ImageMaskFolders(OnDisk):
    """A dataset of one or more folder pairs, in order.

    Args:
        root: root folder of the dataset as downloaded.
        folders: one mapping for each pair, with the keys of `FolderPair`; `images` and `masks` are required.
        side: image and mask are resized to a square of this side; None keeps their size.

    Raises:
        ValueError: if a key is wrong, a folder is missing or empty, files lack a partner, or `check_pair`
            finds a file unfit. On access: if a file is found unfit only when it is decoded.
    """

    def __init__(self, root: str, folders: Sequence[Mapping[str, object]], side: int | None) -> None:
        self.root, self.side, self.several = Path(root), side, len(folders) > 1
        self.pairs: list[tuple[Path, Path, MaskRule]] = []
        for place, given in enumerate(folders):
            one = FolderPair.of(place, given)
            pairs = pair(
                self.root / one.images, self.root / one.masks, one.keep, one.only_with_image, one.mask_suffix
            )
            self.pairs += [(image, mask, one.rule) for image, mask in pairs]
        for image, mask, rule in self.pairs:
            check_pair(image, mask, rule)

    @classmethod
    def survey(cls, root: str, folders: Sequence[Mapping[str, object]], side: int | None) -> Survey:
        """List all pairs and faults; `side` is ignored. Raise ValueError, naming the key, if one is wrong."""
        found, base = Survey(), Path(root)
        for place, given in enumerate(folders):
            one = FolderPair.of(place, given)
            images, masks = base / one.images, base / one.masks
            part = pairing(images, masks, one.keep, one.only_with_image, one.mask_suffix)
            if not part.pairs and not part.faults:
                part.faults.append(
                    f"{images}: at least one image with a mask is needed; there is none{_left(part.unread)}"
                )
            pieces = []
            for image, mask in part.pairs:
                name = cls._named(base, image, len(folders) > 1)
                read = partial(cls._read, image, mask, one.rule, name)
                pieces.append(Piece(id=name, image=image, mask=mask, read=read))
            found.add(
                Survey(
                    pieces=pieces,
                    without_mask=sorted(part.without_mask),
                    without_image=sorted(part.without_image),
                    faults=part.faults,
                    unread=part.unread,
                )
            )
        return found

    @staticmethod
    def _named(root: Path, image: Path, several: bool) -> str:
        """Return a sample's id: the image's stem, with its folder if there are several folder pairs."""
        return image.relative_to(root).with_suffix("").as_posix() if several else image.stem

    @staticmethod
    def _read(image: Path, mask: Path, rule: MaskRule, name: str) -> Sample:
        return replace(read_pair(image, mask, rule=rule), id=name)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    @property
    def ids(self) -> list[str]:
        """Ids of all samples, in order."""
        return [self._named(self.root, image, self.several) for image, _, _ in self.pairs]

    def __getitem__(self, index: int) -> Sample:
        """Read one pair, resized to `side`."""
        image, mask, rule = self.pairs[index]
        name = self._named(self.root, image, self.several)
        with sample_of(name):
            sample = self._read(image, mask, rule, name)
        return sample if self.side is None else squash(sample, self.side)
