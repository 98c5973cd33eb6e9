"""Read image and mask files as arrays, and resize them together. An ambiguous mask raises an error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from segrl.data.boundary import reading
from segrl.data.pictures import (
    NEEDED,
    decoded,
    header,
    in_rgb,
    orientation,
    sixteen,
    turned,
)
from segrl.types import Sample

_INKS = 12  # largest difference between the channels of a grey CMYK mask, from JPEG compression
_PLAIN = ("L", "1")
_DARK = 64  # a grey mask with soft edges or averaged votes has a pixel as dark as this; labels may not
_SAME_SHAPE = 0.01  # largest relative difference of aspect ratios at which a mask may be resized to its image


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRule:
    """Rule for reading masks whose values alone do not define the object."""

    objects: tuple[int, ...] | None = None
    """Values (indices, in a palette file) that are the object; all others are background."""
    background: tuple[int, ...] | None = None
    """Values that are background; all others are the object."""
    resize: bool = False
    """Resize a mask to its image's size (nearest pixel) if the aspect ratios differ by less than 1 %."""

    @property
    def names_values(self) -> bool:
        """Whether `objects` or `background` is set."""
        return self.objects is not None or self.background is not None

    def object_of(self, values: np.ndarray) -> np.ndarray:
        """Return the object's pixels as bool, in the shape of `values`."""
        if self.objects is not None:
            return np.isin(values, self.objects)
        return ~np.isin(values, self.background or ())


PLAIN = MaskRule()


def _greys(image: Image.Image, fewest: int) -> np.ndarray | None:
    """Return the grey values uint8 `[H, W]` of a palette image.

    Return None if it uses a colour, fewer than `fewest` greys, or an index beyond its palette.
    """
    indices, colours = np.asarray(image), image.getpalette("RGB")
    palette = np.asarray(colours or (), np.uint8).reshape(-1, 3)
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
    if used[-1] >= len(palette) or (palette[used] != palette[used][:, :1]).any():
        return None
    table = np.zeros(256, np.uint8)
    table[used] = palette[used][:, 0]
    return table[indices] if len(np.unique(table[used])) >= fewest else None


def _values(path: Path, image: Image.Image) -> np.ndarray:
    """Return the single channel `[H, W]` of a mask file.

    Raises:
        ValueError: if the channels of a colour file differ, its grey is constant while its transparency is
            not, or the mode is not supported.
    """
    match image.mode:
        case "1":  # the bytes of Pillow's own bools are 255, which misleads code that views bytes
            return np.asarray(image.convert("L")) > 0
        case "L" | "P" | "I":
            return np.asarray(image)
        case "I;16" | "I;16L" | "I;16B" | "I;16N":
            return sixteen(path, image)
        case "LA" | "RGB" | "RGBA" | "RGBX":
            values = np.asarray(image)
        case "CMYK":
            return _printed(path, image)
        case _:
            raise ValueError(f"{path}: must be a grey mask; this one is {image.mode} in Pillow's words")
    channels = values[..., :3] if values.shape[-1] >= 3 else values[..., :1]
    if (channels != channels[..., :1]).any():
        raise ValueError(f"{path}: must be a grey mask; this one is {image.mode} and its channels differ")
    if image.mode in ("LA", "RGBA") and np.ptp(channels[..., 0]) == 0 < np.ptp(values[..., -1]):
        raise ValueError(
            f"{path}: must be a grey mask; this one is {channels[0, 0, 0]} everywhere, "
            "and what differs is its transparency (save that as a grey file)"
        )
    return channels[..., 0]


def _printed(path: Path, image: Image.Image) -> np.ndarray:
    """Convert a CMYK mask to grey uint8 `[H, W]`. Raise ValueError, naming the file, if it has colours."""
    shown = np.asarray(image.convert("RGB"))
    if (shown.max(-1) - shown.min(-1) > _INKS).any():
        raise ValueError(f"{path}: must be a grey mask; this one is CMYK and shows colours")
    return shown[..., 1]


def _opened_mask(path: Path) -> Image.Image:
    """Decode a mask file and apply its EXIF orientation."""
    image = decoded(path)
    return turned(image, orientation(image))


def read_mask(path: Path, rule: MaskRule = PLAIN) -> np.ndarray:
    """Read a ground-truth file as bool `[H, W]`.

    If the rule names values, only these decide. Otherwise 1-bit files are taken as they are, and a palette of
    two or more greys is read as grey. In 8-bit grey, values above 128 are the object, or values above 0 if
    the largest value is 1. 16-bit grey is first scaled to 8 bits if a value is above 255.

    Raises:
        ValueError: if the file cannot be decoded, has a palette of colours (indices may name instances), has
            channels that differ, has a largest value from 2 to 128, or holds labels: three or more values,
            the smallest from 65 to 128.
    """
    with reading(path, NEEDED):
        return _object(path, _opened_mask(path), rule)


def _object(path: Path, image: Image.Image, rule: MaskRule) -> np.ndarray:
    """Return the object's pixels of a decoded mask file; see `read_mask`."""
    if rule.names_values:
        return rule.object_of(_values(path, image))
    if image.mode == "P":
        greys = _greys(image, 2)
        if greys is None:
            raise ValueError(
                f"{path}: must be a grey mask; this is a palette PNG, whose indices do not say which is "
                "the object (objects=[INDEX,...] or background=[0], keys of data=image_mask and of its "
                "folder pair, do)"
            )
        values = greys
    else:
        values = _values(path, image)
    if values.dtype == bool:
        return values
    if image.mode == "I":
        sixteen(path, image)
    top = int(values.max())
    if top > 255:  # 16-bit PNG, decoded to uint16 or int32
        values, top = values // 257, top // 257
    if 1 < top <= 128:
        raise ValueError(f"{path}: must be a mask of 0 and 255, or 0 and 1; its largest value is {top}")
    if _DARK < values.min() <= 128 < top and len(found := np.unique(values)) > 2:
        raise ValueError(
            f"{path}: must be a mask with a background of 0; this one has "
            f"{', '.join(map(str, found[:5]))} "
            "(objects=[VALUE,...], a key of data=image_mask and of its folder pair, "
            "says which are the object)"
        )
    return values > (0 if top == 1 else 128)


def read_map(path: Path) -> np.ndarray:
    """Read a predicted mask or grey map as uint8 `[H, W]`.

    1-bit files, and files whose largest value is 1, become 0 and 255. 16-bit files with a value above 255
    keep their upper 8 bits, as OpenCV reads them; others keep their values.

    Raises:
        ValueError: if the file cannot be decoded, has a palette of colours, or has channels that differ.
    """
    with reading(path, NEEDED):
        image = _opened_mask(path)
        values = _greys(image, 1) if image.mode == "P" else _values(path, image)
        if values is None:
            raise ValueError(f"{path}: must be a grey map; this is a palette PNG of colours")
        if image.mode == "I":
            sixteen(path, image)
        if values.dtype == bool or values.max() == 1:
            return values.astype(np.uint8) * 255
        return (values >> 8 if values.max() > 255 else values).astype(np.uint8)


def mask_kind(path: Path) -> str:
    """Return the kind of a ground-truth file's values as text.

    The kinds are "1 bit", "palette", "0/255", "0/65535", "0/1" and "graded". The last four have the prefixes
    "N channels, " and "16 bit, " where these apply.

    Raises:
        ValueError: as `_values`, or if the file cannot be decoded.
    """
    image = decoded(path)
    if image.mode in ("1", "P"):
        return {"1": "1 bit", "P": "palette"}[image.mode]
    values = _values(path, image)
    many = f"{len(image.getbands())} channels, " if len(image.getbands()) > 1 else ""
    depth = "" if values.dtype == np.uint8 else "16 bit, "
    found = set(
        np.flatnonzero(np.bincount(values.ravel()))
        if values.dtype == np.uint8
        else np.unique(values).tolist()
    )
    if found <= {0, 255} or found <= {0, 65535}:
        return f"{many}{depth}0/{255 if max(found) < 256 else 65535}"
    return f"{many}{depth}{'0/1' if found <= {0, 1} else 'graded'}"


def read_image(
    path: Path, size: tuple[int, int] | None = None, content: bytes | None = None, upright: bool = False
) -> np.ndarray:
    """Read an image as uint8 RGB `[H, W, 3]`; see `in_rgb` for the conversion.

    Args:
        path: the file.
        size: height and width of the mask. The EXIF rotation is applied if the rotated image has this size;
            if None, only if `upright`.
        content: the image's bytes, if they are only a part of the file.
        upright: always apply the EXIF rotation.

    Raises:
        ValueError: if the file cannot be decoded or converted.
    """
    with reading(path, NEEDED):
        image = decoded(path, content)
        shown = turned(image, orientation(image))
        if upright or (size is not None and shown.size == (size[1], size[0])):
            image = shown
        return in_rgb(path, image)


def _same_shape(image: tuple[int, int], mask: tuple[int, int]) -> bool:
    """Return whether image and mask have nearly the same aspect ratio. Sizes are width, height."""
    return abs(image[0] * mask[1] / (image[1] * mask[0]) - 1) < _SAME_SHAPE


def _sizes_differ(
    image_path: Path, image: tuple[int, int], mask_path: Path, mask: tuple[int, int]
) -> ValueError:
    """Return the error for an image and a mask of different sizes. Sizes are width, height."""
    way_out = (
        " (resize_masks=true, a key of data=image_mask and of its folder pair, resizes it)"
        if _same_shape(image, mask)
        else ""
    )
    return ValueError(
        f"{mask_path}: must be of its image's size; the mask is {mask[0]}x{mask[1]}, "
        f"{image_path.name} is {image[0]}x{image[1]}{way_out}"
    )


def check_pair(image_path: Path, mask_path: Path, rule: MaskRule = PLAIN) -> None:
    """Check a pair by the files' headers.

    A mask is decoded if its mode is neither 8-bit grey nor 1-bit, or if it is a PNG without its last chunk.
    An image is decoded only if it is such a PNG.

    Raises:
        ValueError: as `read_pair`, except for faults that only decoding shows: damaged pixels, and the values
            of a grey mask.
    """
    image, mask = header(image_path), header(mask_path)
    fits = mask.shown in (image.size, image.shown) or rule.resize and _same_shape(image.size, mask.shown)
    if not fits:
        raise _sizes_differ(image_path, image.size, mask_path, mask.shown)
    if mask.mode not in _PLAIN or not _ends_whole(mask_path):
        read_mask(mask_path, rule)
    if not _ends_whole(image_path):
        read_image(image_path)


def _ends_whole(path: Path) -> bool:
    """Return whether a PNG has its last chunk; True for other formats."""
    if path.suffix.lower() != ".png":
        return True
    with reading(path, NEEDED), path.open("rb") as file:
        file.seek(-min(12, path.stat().st_size), 2)
        return b"IEND" in file.read()


def read_pair(image_path: Path, mask_path: Path, query: str | None = None, rule: MaskRule = PLAIN) -> Sample:
    """Return image and mask, of the same size, as a sample whose id is the image's stem.

    Raises:
        ValueError: if a file cannot be decoded, the mask is refused by `read_mask`, or the sizes differ and
            `rule.resize` is false or the aspect ratios differ by 1 % or more.
    """
    mask = read_mask(mask_path, rule)
    image = read_image(image_path, (mask.shape[0], mask.shape[1]))
    size = image.shape[1], image.shape[0]
    if mask.shape[::-1] != size:
        if not rule.resize or not _same_shape(size, mask.shape[::-1]):
            raise _sizes_differ(image_path, size, mask_path, mask.shape[::-1])
        mask = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    return Sample(id=image_path.stem, image=image, mask=mask, query=query, path=image_path)


def squash(sample: Sample, side: int) -> Sample:
    """Return the sample resized to a square, as in Seg-R1's training.

    The image is resized bicubically. A pixel of a mask is set if at least half of its area was.
    """
    if sample.mask.shape == (side, side):
        return sample
    image = Image.fromarray(sample.image).resize((side, side), Image.Resampling.BICUBIC)
    objects, ignore = sample.objects, sample.ignore
    return replace(
        sample,
        image=np.asarray(image),
        mask=_squashed(sample.mask, side),
        objects=None
        if objects is None
        else np.array([_squashed(mask, side) for mask in objects], bool).reshape(-1, side, side),
        ignore=None if ignore is None else _squashed(ignore, side),
    )


def _squashed(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize bool `[H, W]` to bool `[side, side]`: a pixel is set if at least half of its area was."""
    share = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    return np.asarray(share) > 127
