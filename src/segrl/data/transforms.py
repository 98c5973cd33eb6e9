"""Image and mask files to arrays, resized together. Whatever is ambiguous in a mask is refused, not guessed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from segrl.types import Sample

_ORIENTATION = 0x0112  # EXIF; 5 and above lie on their side
_UNDECODABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError)


def _open(path: Path) -> Image.Image:
    """The decoded file; ValueError naming it if it is no image or is cut off."""
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise ValueError(f"{path}: an image is needed; there is no such file") from None
    except (*_UNDECODABLE, ValueError) as error:
        raise ValueError(f"{path}: an image is needed; the file cannot be decoded ({error})") from None
    return image


def read_mask(path: Path) -> np.ndarray:
    """A ground-truth file to bool `[H, W]`.

    Grey 8-bit: above 128 is object, or above 0 where the largest value is 1. 16-bit scales to 8, unless all its values
    are those of 8 bits; 1-bit is as it is.

    Raises:
        ValueError: for a file that cannot be decoded, a palette file (its indices name instances: which is the
            object?), a colour file whose channels differ, and grey values that are neither 0/1 nor reach above 128.
    """
    image = _open(path)
    if image.mode == "P":
        raise ValueError(
            f"{path}: a grey mask is needed; this is a palette PNG, whose indices do not say which is the object"
        )
    values = np.asarray(image)
    if values.ndim == 3:
        channels = values[..., :3] if values.shape[-1] >= 3 else values[..., :1]
        if (channels != channels[..., :1]).any():
            raise ValueError(
                f"{path}: a grey mask is needed; this one is {image.mode} and its channels differ"
            )
        values = channels[..., 0]
    if values.dtype == bool:
        return values
    top = int(values.max())
    if top > 255:  # 16-bit PNG, decoded to uint16 or int32
        values, top = values // 257, top // 257
    if 1 < top <= 128:
        raise ValueError(f"{path}: a mask of 0 and 255, or 0 and 1, is needed; its largest value is {top}")
    return values > (0 if top == 1 else 128)


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A photograph to uint8 RGB `[H, W, 3]`; grey, palette and transparent files are converted.

    Args:
        path: the file.
        size: height and width of its mask: the EXIF rotation is applied only if that gives this size.

    Raises:
        ValueError: for a file that cannot be decoded.
    """
    image = _open(path)
    upright = ImageOps.exif_transpose(image)
    if size is not None and upright.size == (size[1], size[0]):
        image = upright
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut it off at 255
        grey = (np.asarray(image) // 257).astype(np.uint8)
        return np.stack([grey] * 3, -1)
    return np.asarray(image.convert("RGB"))


def _sizes_differ(
    image_path: Path, image: tuple[int, int], mask_path: Path, mask: tuple[int, int]
) -> ValueError:
    """Sizes are width, height."""
    return ValueError(
        f"{mask_path}: a mask of its image's size is needed; the mask is {mask[0]}x{mask[1]}, "
        f"{image_path.name} is {image[0]}x{image[1]}"
    )


def check_pair(image_path: Path, mask_path: Path) -> None:
    """Find what makes a pair unfit from the files' headers; only a mask that is not plainly grey is decoded.

    Raises:
        ValueError: as `read_pair`, except for damage inside a file whose beginning and end are whole.
    """
    try:
        with Image.open(image_path) as image:
            size, turned = image.size, image.getexif().get(_ORIENTATION, 1) >= 5
    except _UNDECODABLE as error:
        raise ValueError(f"{image_path}: an image is needed; the file cannot be decoded ({error})") from None
    try:
        with Image.open(mask_path) as mask:
            wanted, plain = mask.size, mask.mode in ("L", "1")
    except _UNDECODABLE as error:
        raise ValueError(f"{mask_path}: an image is needed; the file cannot be decoded ({error})") from None
    if wanted != size and not (turned and wanted == size[::-1]):
        raise _sizes_differ(image_path, size, mask_path, wanted)
    if not plain or not _ends_whole(mask_path):
        read_mask(mask_path)


def _ends_whole(path: Path) -> bool:
    """Whether a PNG has its last chunk; other formats are not judged by their end."""
    if path.suffix.lower() != ".png":
        return True
    with path.open("rb") as file:
        file.seek(-min(12, path.stat().st_size), 2)
        return b"IEND" in file.read()


def read_pair(image_path: Path, mask_path: Path, query: str | None = None) -> Sample:
    """An image and its mask as a sample named by the image's stem.

    Raises:
        ValueError: if either cannot be decoded, or their sizes differ.
    """
    mask = read_mask(mask_path)
    image = read_image(image_path, (mask.shape[0], mask.shape[1]))
    if image.shape[:2] != mask.shape:
        raise _sizes_differ(image_path, image.shape[1::-1], mask_path, mask.shape[::-1])
    return Sample(id=image_path.stem, image=image, mask=mask, query=query, path=image_path)


def squash(sample: Sample, side: int) -> Sample:
    """Resize to a square, as Seg-R1 trains: the image bicubic, the mask by its share of each new pixel."""
    if sample.mask.shape == (side, side):
        return sample
    image = Image.fromarray(sample.image).resize((side, side), Image.Resampling.BICUBIC)
    objects = sample.objects
    return replace(
        sample,
        image=np.asarray(image),
        mask=_squashed(sample.mask, side),
        objects=None
        if objects is None
        else np.array([_squashed(mask, side) for mask in objects], bool).reshape(-1, side, side),
    )


def _squashed(mask: np.ndarray, side: int) -> np.ndarray:
    """Bool `[H, W]` to bool `[side, side]`: pixels of which at least half is object."""
    share = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    return np.asarray(share) > 127
