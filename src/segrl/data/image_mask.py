"""Folders of images and folders of masks, paired by stem: any dataset of this shape is one YAML and no code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch.utils.data import Dataset

from segrl.data.transforms import check_pair, read_pair, squash
from segrl.types import Sample

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp"}
_MASKS = {".png", ".jpg", ".jpeg", ".bmp"}


def _files(folder: Path, suffixes: set[str], keep: str) -> dict[str, Path]:
    """Stem to file, system files left out; raises ValueError on two files of one stem."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("._") or path.suffix.lower() not in suffixes or keep not in path.stem:
            continue
        if path.stem in found:
            raise ValueError(
                f"{folder}: one file per name is needed; got {found[path.stem].name} and {path.name}"
            )
        found[path.stem] = path
    return found


def _first(names: set[str]) -> str:
    """The first five, and how many there are."""
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def pair(images: Path, masks: Path, keep: str, only_with_image: bool = False) -> list[tuple[Path, Path]]:
    """Image and mask files of one folder pair, by stem.

    Args:
        images: folder of photographs, read flat.
        masks: folder of ground truth, read flat.
        keep: only stems that contain this take part ("" keeps all).
        only_with_image: masks without an image are another split's: CAMO keeps all its ground truth in one folder.

    Raises:
        ValueError: naming the first five files that stand alone, or the folder that is missing or empty.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"data: a folder is needed; there is no {folder} (set data.root)")
    pictures, truths = _files(images, _IMAGES, keep), _files(masks, _MASKS, keep)
    if alone := set(pictures) - set(truths):
        raise ValueError(f"{masks}: a mask for every image is needed; there is none for {_first(alone)}")
    if not only_with_image and (alone := set(truths) - set(pictures)):
        raise ValueError(f"{images}: an image for every mask is needed; there is none for {_first(alone)}")
    if not pictures:
        raise ValueError(
            f"{images}: at least one image is needed; the folder holds none"
            + (f" named *{keep}*" if keep else "")
        )
    return [(path, truths[stem]) for stem, path in pictures.items()]


class ImageMaskFolders(Dataset[Sample]):
    """One or more folder pairs in a row.

    Args:
        root: of the dataset as downloaded.
        folders: of each pair: `images` and `masks` relative to root, optionally `keep` and `only_with_image`.
        side: resize to this square, image and mask together; none leaves them as they are.

    Raises:
        ValueError: if a folder is missing or empty, or files stand alone; on access, if a file is unfit.
    """

    def __init__(self, root: str, folders: Sequence[dict[str, str | bool]], side: int | None) -> None:
        self.pairs: list[tuple[Path, Path]] = []
        for one in folders:
            self.pairs += pair(
                Path(root) / str(one["images"]), Path(root) / str(one["masks"]),
                str(one.get("keep", "")), bool(one.get("only_with_image", False)),
            )  # fmt: skip
        for image, mask in self.pairs:
            check_pair(image, mask)
        self.root, self.side = Path(root), side
        self.several = len(folders) > 1

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def ids(self) -> list[str]:
        """Of all samples, in order: the image's name, with its folder where there are several that may share names."""
        return [self._id(image) for image, _ in self.pairs]

    def _id(self, image: Path) -> str:
        return image.relative_to(self.root).with_suffix("").as_posix() if self.several else image.stem

    def __getitem__(self, index: int) -> Sample:
        """Read one pair."""
        image, mask = self.pairs[index]
        sample = replace(read_pair(image, mask), id=self._id(image))
        return sample if self.side is None else squash(sample, self.side)
