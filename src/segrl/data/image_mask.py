"""Read datasets that are folders of images and folders of masks, paired by the stem of the file name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

from pydantic import BaseModel, ConfigDict

from segrl.data.boundary import validated
from segrl.data.pictures import SUFFIXES
from segrl.data.survey import Item, ItemDataset, Survey, by_stem, first_names, listed, not_read
from segrl.data.transforms import MaskRule, check_pair, read_pair
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
        one = validated(cls, dict(given), f"folders[{place}].")
        if one.objects is not None and one.background is not None:
            raise ValueError(
                f"folders[{place}].background: must not be given beside objects; got {list(one.background)}"
            )
        return one

    @property
    def rule(self) -> MaskRule:
        """Rule by which the masks are read."""
        return MaskRule(
            objects=None if self.objects is None else tuple(self.objects),
            background=None if self.background is None else tuple(self.background),
            resize=self.resize_masks,
        )


def _files(folder: Path, keep: str, faults: list[str], unread: Counter[str]) -> dict[str, Path]:
    """Return the image files by stem, if the stem contains `keep`; two files with one stem are a fault."""
    files = listed(folder, SUFFIXES, unread, faults)
    keep = normalize("NFC", keep)
    return by_stem((path for path in files if keep in normalize("NFC", path.stem)), faults)


def _read(image: Path, mask: Path, rule: MaskRule, name: str) -> Sample:
    """Read one sample at its own size."""
    return replace(read_pair(image, mask, rule=rule), id=name)


def _pairs(root: Path, one: FolderPair, several: bool) -> Survey:
    """List the pairs and the faults of one folder pair.

    An id is the image's stem, with its folder if the dataset has several folder pairs.
    """
    images, masks, found = root / one.images, root / one.masks, Survey()
    for folder in (images, masks):
        if not folder.is_dir():
            found.faults.append(
                f"data: images and masks must be folders; there is no folder {folder} "
                "(set data.root, or the root of the test set)"
            )
    if found.faults:
        return found
    pictures = _files(images, one.keep, found.faults, found.unread)
    truths = pictures if images == masks else _files(masks, one.keep, found.faults, found.unread)
    if end := normalize("NFC", one.mask_suffix):
        truths = {stem.removesuffix(end): path for stem, path in truths.items() if stem.endswith(end)}
        if images == masks:
            pictures = {stem: path for stem, path in pictures.items() if not stem.endswith(end)}
    for stem, image in pictures.items():
        if (mask := truths.get(stem)) is not None:
            name = image.relative_to(root).with_suffix("").as_posix() if several else image.stem
            read, check = (
                partial(_read, image, mask, one.rule, name),
                partial(check_pair, image, mask, one.rule),
            )
            found.items.append(Item(id=name, image=image, mask=mask, read=read, check=check))
    found.without_mask = sorted(set(pictures) - set(truths))
    found.without_image = [] if one.only_with_image else sorted(set(truths) - set(pictures))
    return found.close(
        mask=f"{masks}: must hold a mask for every image",
        image=f"{images}: must hold an image for every mask",
        empty=f"{images}: must hold at least one image with a mask; the folder holds none"
        + f" named *{one.keep}*" * bool(one.keep),
    )


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
            raise ValueError(f"{key}: must be a folder; there is no folder {folder}")
    faults: list[str] = []
    unread: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    maps, masks = (
        _files(folder, keep, faults, left) for folder, left in zip((predictions, truths), unread, strict=True)
    )
    if faults:
        raise ValueError(faults[0])
    if alone := set(masks) - set(maps):
        raise ValueError(
            f"pred: must hold a map for every ground truth; there is none for {first_names(alone)}"
            f"{_deeper('pred', predictions)}{not_read(unread[0])}"
        )
    if alone := set(maps) - set(masks):
        raise ValueError(
            f"gt: must hold a ground truth for every map; there is none for {first_names(alone)}"
            f"{_deeper('gt', truths)}{not_read(unread[1])}"
        )
    if not masks:
        raise ValueError(
            f"gt: must hold at least one mask; {truths} holds none"
            + f" named *{keep}*" * bool(keep)
            + f"{_deeper('gt', truths)}{not_read(unread[1])}"
        )
    return [(maps[stem], masks[stem]) for stem in masks]


class ImageMaskFolders(ItemDataset):
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
        super().__init__(self.survey(root, folders, side), side)

    @classmethod
    def survey(cls, root: str, folders: Sequence[Mapping[str, object]], side: int | None) -> Survey:
        """List all pairs and faults; `side` is ignored. Raise ValueError, naming the key, if one is wrong."""
        found = Survey()
        for place, given in enumerate(folders):
            found.add(_pairs(Path(root), FolderPair.of(place, given), len(folders) > 1))
        return found
