"""Decode image files: the accepted formats, EXIF orientation, and the conversion of modes to pixels."""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from segrl.data.boundary import reading

warnings.filterwarnings("ignore", module="PIL")  # Pillow's warnings do not name the file

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
"""Suffixes, in lower case, of image files in a folder."""
NEEDED = "must be an image; the file cannot be decoded"

# Other formats run programs (EPS) or hold layers instead of one image.
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP", "AVIF", "GIF", "PPM", "JPEG2000")
_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = 5  # orientations from this one on swap height and width
_COLOURS = frozenset({"1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_SIXTEEN = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_PNG = b"\x89PNG\r\n\x1a\n"
_METADATA = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})


@cache
def _formats() -> tuple[str, ...]:
    """Return the names in `_FORMATS` that the installed Pillow can decode."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def decoded(path: Path, content: bytes | None = None) -> Image.Image:
    """Return the decoded image as stored, without rotation, from the file or from `content`.

    Raises:
        ValueError: if the file is not an image of these formats, is cut off, or is refused by `loaded`.
    """
    with reading(path, NEEDED):
        try:
            image = Image.open(path if content is None else BytesIO(content), formats=_formats())
            return loaded(path, image)
        except ValueError:
            stored = path.read_bytes() if content is None else content
            if not stored.startswith(_PNG):
                raise
        # Pillow refuses a PNG with more than 1 MB of metadata, which the pixels do not depend on
        return loaded(path, Image.open(BytesIO(_without_metadata(stored)), formats=_formats()))


def _without_metadata(content: bytes) -> bytes:
    """Return a PNG's bytes without its text and colour-profile chunks.

    XMP is kept, because it may hold the orientation. Other chunks are not checked; Pillow refuses damage.
    """
    kept, at = [content[:8]], 8
    while at + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        name, end = content[at + 4 : at + 8], at + 12 + length
        if name not in _METADATA or b"XML:com.adobe.xmp" in content[at + 8 : at + 32]:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def loaded(where: object, image: Image.Image) -> Image.Image:
    """Decode an opened image and return it.

    Raises:
        ValueError: if it cannot be decoded, has no pixels, holds several images, is a CMYK JPEG without
            Adobe's marker, or has 16-bit colour channels whose upper bytes are all 0.
    """
    with reading(where, NEEDED):
        # MPO is a phone's photograph with previews.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise ValueError(f"{where}: must hold one picture; this {image.format} file holds several")
        deep = (
            any(";16" in str(tile.args) for tile in getattr(image, "tile", ())) and len(image.getbands()) > 1
        )
        image.load()
        if not (image.width and image.height):
            raise ValueError(f"{where}: must be an image; it has no pixel")
        if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
            raise ValueError(
                f"{where}: a JPEG of inks (CMYK) must have Adobe's marker; without it nothing says "
                "whether 0 is no ink or all of it (save it as RGB)"
            )
        if deep and not np.asarray(image)[..., :3].any():
            raise ValueError(
                f"{where}: 16 bits a channel must reach above 255; these hold nothing, "
                "or values of 8 bits (save it with 8 bits a channel)"
            )
    return image


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Size, orientation and mode of an image file, read from its header."""

    size: tuple[int, int]
    """Width and height as stored."""
    turn: int
    """EXIF orientation, 1 to 8."""
    mode: str
    """Pillow's mode: "L", "RGB", "CMYK" ..."""

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height after the EXIF rotation."""
        return self.size[::-1] if self.turn >= _SIDEWAYS else self.size


def header(path: Path, content: bytes | None = None) -> Header:
    """Return size, orientation and mode from an image's header.

    If Pillow raises ValueError, as for a PNG with too much metadata, the whole image is decoded.

    Raises:
        ValueError: if the file is not an image.
    """
    with reading(path, NEEDED):
        try:
            with Image.open(path if content is None else BytesIO(content), formats=_formats()) as image:
                return Header(size=image.size, turn=orientation(image), mode=image.mode)
        except ValueError:
            whole = decoded(path, content)
            return Header(size=whole.size, turn=orientation(whole), mode=whole.mode)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing, damaged or out of range.

    For a TIFF return 1, because Pillow applies its orientation when it decodes.
    """
    if image.format == "TIFF":
        return 1
    try:
        said = Image.Image.getexif(image).get(_ORIENTATION, 1)  # a PNG's own getexif would decode it
        return next((turn for turn in _TURNS if not isinstance(said, str | bytes) and turn == said), 1)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
        struct.error,
    ):
        return 1


def turned(pixels: Image.Image, turn: int) -> Image.Image:
    """Return the image with an EXIF orientation applied."""
    return pixels.transpose(_TURNS[turn]) if turn in _TURNS else pixels


def in_rgb(where: object, image: Image.Image) -> np.ndarray:
    """Return a decoded image as uint8 RGB `[H, W, 3]`.

    Grey, palette, CMYK and transparent images are converted. 16-bit grey is scaled to 8 bits if a value is
    above 255, and taken as it is otherwise.

    Raises:
        ValueError: if the mode cannot be converted, or values leave 16 bits.
    """
    with reading(where, NEEDED):
        if image.mode in _SIXTEEN:
            values = sixteen(where, image)
            grey = (values // 257 if values.max() > 255 else values).astype(np.uint8)
            return np.stack([grey] * 3, -1)
        if image.mode not in _COLOURS:
            raise ValueError(
                f"{where}: must be a picture in grey or colour of 8 or 16 bits; "
                f"this one is {image.mode} in Pillow's words"
            )
        if image.mode in ("RGBa", "La"):
            image = image.convert(f"{image.mode[:-1]}A")
        return np.asarray(image.convert("RGB"))


def sixteen(where: object, image: Image.Image) -> np.ndarray:
    """Return the values `[H, W]` of a grey image of more than 8 bits, as int32 (mode "I") or uint16.

    Raises:
        ValueError: if a value is not in 0..65535.
    """
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{where}: grey values must be from 0 to 65535; they go from {values.min()} to {values.max()}"
        )
    return values if image.mode == "I" else values.astype(np.uint16)
