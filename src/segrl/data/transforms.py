"""Image and mask files to arrays, resized together. Whatever is ambiguous in a mask is refused, not guessed."""

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

_INKS = (
    12  # largest difference of channels that is a JPEG's noise where four inks are printed over each other
)
_PLAIN = ("L", "1")
_DARK = 64  # no soft edge and no vote leaves a mask without any pixel as dark as this; labels do
_SAME_SHAPE = 0.01  # largest difference of aspect over which a mask is brought to its image's size


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRule:
    """How masks are read that do not say by themselves which pixels are the object."""

    objects: tuple[int, ...] | None = None
    """Values (indices, in a palette file) that are the object; all others are background."""
    background: tuple[int, ...] | None = None
    """Values that are background; all others are the object."""
    resize: bool = False
    """Bring a mask of another size to its image's, nearest pixel, where their aspects differ by less than 1 %."""

    @property
    def names_values(self) -> bool:
        """Whether it says which values are the object."""
        return self.objects is not None or self.background is not None

    def object_of(self, values: np.ndarray) -> np.ndarray:
        """Bool: where the object is."""
        if self.objects is not None:
            return np.isin(values, self.objects)
        return ~np.isin(values, self.background or ())


PLAIN = MaskRule()


def _greys(image: Image.Image, fewest: int) -> np.ndarray | None:
    """Return the grey values uint8 `[H, W]` of a palette image with at least `fewest` greys and no colour; None otherwise."""
    indices, colours = np.asarray(image), image.getpalette("RGB")
    palette = np.asarray(colours or (), np.uint8).reshape(-1, 3)
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
    if used[-1] >= len(palette) or (palette[used] != palette[used][:, :1]).any():
        return None
    table = np.zeros(256, np.uint8)
    table[used] = palette[used][:, 0]
    return table[indices] if len(np.unique(table[used])) >= fewest else None


def _values(path: Path, image: Image.Image) -> np.ndarray:
    """A mask file's one channel `[H, W]`.

    Raises:
        ValueError: naming a colour file whose channels differ, one that shows nothing but has something in its transparency,
            and a mode that is no mask's.
    """
    match image.mode:
        case "1":  # Pillow's own bools have bytes of 255, and whoever looks at bytes is misled
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
            raise ValueError(f"{path}: a grey mask is needed; this one is {image.mode} in Pillow's words")
    channels = values[..., :3] if values.shape[-1] >= 3 else values[..., :1]
    if (channels != channels[..., :1]).any():
        raise ValueError(f"{path}: a grey mask is needed; this one is {image.mode} and its channels differ")
    if image.mode in ("LA", "RGBA") and np.ptp(channels[..., 0]) == 0 < np.ptp(values[..., -1]):
        raise ValueError(
            f"{path}: a grey mask is needed; this one is {channels[0, 0, 0]} everywhere, and what differs is its "
            "transparency (save that as a grey file)"
        )
    return channels[..., 0]


def _printed(path: Path, image: Image.Image) -> np.ndarray:
    """Convert a CMYK mask to grey uint8 `[H, W]`. Raises ValueError, naming the file, if it has colours."""
    shown = np.asarray(image.convert("RGB"))
    if (shown.max(-1) - shown.min(-1) > _INKS).any():
        raise ValueError(f"{path}: a grey mask is needed; this one is CMYK and shows colours")
    return shown[..., 1]


def _opened_mask(path: Path) -> Image.Image:
    """A mask file, turned as it says that it is to be seen."""
    image = decoded(path)
    return turned(image, orientation(image))


def read_mask(path: Path, rule: MaskRule = PLAIN) -> np.ndarray:
    """A ground-truth file to bool `[H, W]`.

    Grey 8-bit: above 128 is object, or above 0 where the largest value is 1. 16-bit scales to 8, unless all its values
    are those of 8 bits; 1-bit is as it is. A palette that shows several greys is grey. A rule that names values beats all this.

    Raises:
        ValueError: for a file that cannot be decoded, a coloured palette file (its indices name instances: which is
            the object?), a colour file whose channels differ, and grey values that are neither 0/1 nor reach above 128,
            or that are labels: three or more, none of them dark.
    """
    with reading(path, NEEDED):
        return _object(path, _opened_mask(path), rule)


def _object(path: Path, image: Image.Image, rule: MaskRule) -> np.ndarray:
    """As `read_mask`, of the decoded file."""
    if rule.names_values:
        return rule.object_of(_values(path, image))
    if image.mode == "P":
        greys = _greys(image, 2)
        if greys is None:
            raise ValueError(
                f"{path}: a grey mask is needed; this is a palette PNG, whose indices do not say which is the object "
                "(objects=[INDEX,...] or background=[0], keys of data=image_mask and of its folder pair, do)"
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
        raise ValueError(f"{path}: a mask of 0 and 255, or 0 and 1, is needed; its largest value is {top}")
    if _DARK < values.min() <= 128 < top and len(found := np.unique(values)) > 2:
        raise ValueError(
            f"{path}: a mask with a background of 0 is needed; this one has {', '.join(map(str, found[:5]))} "
            "(objects=[VALUE,...], a key of data=image_mask and of its folder pair, says which are the object)"
        )
    return values > (0 if top == 1 else 128)


def read_map(path: Path) -> np.ndarray:
    """A predicted mask or grey map to uint8 `[H, W]`: 1 bit is 0 and 255, of 16 bits the upper 8 count, as OpenCV reads them.

    A file of 0 and 1 alone is a mask, and is 0 and 255. A 16-bit file all of whose values are those of 8 bits is as it is, like a ground truth.

    Raises:
        ValueError: for a file that cannot be decoded, a coloured palette, or a colour file whose channels differ.
    """
    with reading(path, NEEDED):
        image = _opened_mask(path)
        values = _greys(image, 1) if image.mode == "P" else _values(path, image)
        if values is None:
            raise ValueError(f"{path}: a grey map is needed; this is a palette PNG of colours")
        if image.mode == "I":
            sixteen(path, image)
        if values.dtype == bool or values.max() == 1:
            return values.astype(np.uint8) * 255
        return (values >> 8 if values.max() > 255 else values).astype(np.uint8)


def mask_kind(path: Path) -> str:
    """What a ground-truth file holds, in words: "0/255", "0/1", "graded", "palette", with "16 bit" or "3 channels" before."""
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
    """A photograph to uint8 RGB `[H, W, 3]`; grey, palette and transparent files are converted.

    Args:
        path: the file.
        size: height and width of its mask: the EXIF rotation is applied only if that gives this size.
        content: the image's bytes, where they are only a part of the file.
        upright: the EXIF rotation is applied, whatever the size: nothing but the photograph says how it is meant.

    Raises:
        ValueError: for a file that cannot be decoded.
    """
    with reading(path, NEEDED):
        image = decoded(path, content)
        shown = turned(image, orientation(image))
        if upright or (size is not None and shown.size == (size[1], size[0])):
            image = shown
        return in_rgb(path, image)


def _same_shape(image: tuple[int, int], mask: tuple[int, int]) -> bool:
    """Whether a mask may be brought to its image's size."""
    return abs(image[0] * mask[1] / (image[1] * mask[0]) - 1) < _SAME_SHAPE


def _sizes_differ(
    image_path: Path, image: tuple[int, int], mask_path: Path, mask: tuple[int, int]
) -> ValueError:
    """Sizes are width, height."""
    way_out = (
        " (resize_masks=true, a key of data=image_mask and of its folder pair, resizes it)"
        if _same_shape(image, mask)
        else ""
    )
    return ValueError(
        f"{mask_path}: a mask of its image's size is needed; the mask is {mask[0]}x{mask[1]}, "
        f"{image_path.name} is {image[0]}x{image[1]}{way_out}"
    )


def check_pair(image_path: Path, mask_path: Path, rule: MaskRule = PLAIN) -> None:
    """Find what makes a pair unfit from the files' headers; only a mask that is not plainly grey is decoded.

    Raises:
        ValueError: as `read_pair`, except for damage inside a file whose beginning and end are whole, and labels in grey.
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
    """Whether a PNG has its last chunk; other formats are not judged by their end."""
    if path.suffix.lower() != ".png":
        return True
    with reading(path, NEEDED), path.open("rb") as file:
        file.seek(-min(12, path.stat().st_size), 2)
        return b"IEND" in file.read()


def read_pair(image_path: Path, mask_path: Path, query: str | None = None, rule: MaskRule = PLAIN) -> Sample:
    """An image and its mask as a sample named by the image's stem; what is scored is a mask of the image's size.

    Raises:
        ValueError: if either cannot be decoded, or their sizes differ and the rule does not say to resize.
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
    """Resize to a square, as Seg-R1 trains: the image bicubic, mask and ignored pixels by their share of each new one."""
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
    """Bool `[H, W]` to bool `[side, side]`: pixels of which at least half is object."""
    share = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    return np.asarray(share) > 127
