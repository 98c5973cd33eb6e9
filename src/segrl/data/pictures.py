"""One image file to pixels: which formats are decoded, how a picture is turned, and what its modes mean."""

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

warnings.filterwarnings("ignore", module="PIL")  # Pillow's warnings name no file

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
"""Suffixes, in lower case, of the files that are taken for images in a folder."""
NEEDED = "an image is needed; the file cannot be decoded"

# Others call programs (EPS), or have layers and no single picture.
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP", "AVIF", "GIF", "PPM", "JPEG2000")
_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = 5  # orientations from here on exchange height and width
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
    """Return the decoded file, or bytes of it, as it is stored.

    Raises:
        ValueError: naming a file that is no image, is cut off, or holds several pictures.
    """
    with reading(path, NEEDED):
        try:
            image = Image.open(path if content is None else BytesIO(content), formats=_formats())
            return loaded(path, image)
        except ValueError:
            stored = path.read_bytes() if content is None else content
            if not stored.startswith(_PNG):
                raise
        # Pillow refuses a PNG for metadata beyond 1 MB, and a picture does not need them
        return loaded(path, Image.open(BytesIO(_without_metadata(stored)), formats=_formats()))


def _without_metadata(content: bytes) -> bytes:
    """Return a PNG's bytes without its text and colour-profile chunks. A damaged chunk is kept, so that Pillow refuses it."""
    kept, at = [content[:8]], 8
    while at + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        name, end = content[at + 4 : at + 8], at + 12 + length
        if name not in _METADATA or b"XML:com.adobe.xmp" in content[at + 8 : at + 32]:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def loaded(where: object, image: Image.Image) -> Image.Image:
    """Decode an image that was opened, and return it. Raises ValueError naming one that is none, or is several pictures."""
    with reading(where, NEEDED):
        if image.format != "MPO" and getattr(
            image, "is_animated", False
        ):  # MPO: a photograph of a phone, whose other pictures are previews
            raise ValueError(f"{where}: one picture is needed; this {image.format} file holds several")
        deep = (
            any(";16" in str(tile.args) for tile in getattr(image, "tile", ())) and len(image.getbands()) > 1
        )
        image.load()
        if not (image.width and image.height):
            raise ValueError(f"{where}: an image is needed; it has no pixel")
        if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
            raise ValueError(
                f"{where}: a JPEG of inks (CMYK) with Adobe's marker is needed; without it nothing says "
                "whether 0 is no ink or all of it (save it as RGB)"
            )
        if deep and not np.asarray(image)[..., :3].any():
            raise ValueError(
                f"{where}: 16 bits a channel that reach above 255 are needed; these hold nothing, or values of "
                "8 bits (save it with 8 bits a channel)"
            )
    return image


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Size, orientation and mode of an image file, read from its header."""

    size: tuple[int, int]
    """Width and height as stored."""
    turn: int
    """EXIF's orientation, 1 to 8."""
    mode: str
    """Pillow's mode: "L", "RGB", "CMYK" ..."""

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height as the camera meant the picture to be seen."""
        return self.size[::-1] if self.turn >= _SIDEWAYS else self.size


def header(path: Path, content: bytes | None = None) -> Header:
    """Return what a file's beginning says. Raises ValueError naming what is no image.

    Only of a PNG with more metadata than Pillow reads the picture is decoded.
    """
    with reading(path, NEEDED):
        try:
            with Image.open(path if content is None else BytesIO(content), formats=_formats()) as image:
                return Header(size=image.size, turn=orientation(image), mode=image.mode)
        except ValueError:
            whole = decoded(path, content)
            return Header(size=whole.size, turn=orientation(whole), mode=whole.mode)


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 where there is none, it is broken, or is no such number.

    A TIFF counts as 1: Pillow turns it while it decodes.
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
    """Return the picture as an orientation says that it is to be seen."""
    return pixels.transpose(_TURNS[turn]) if turn in _TURNS else pixels


def in_rgb(where: object, image: Image.Image) -> np.ndarray:
    """Return a decoded picture as uint8 RGB `[H, W, 3]`.

    Grey, palette, inks and transparency are converted. 16-bit grey scales to 8 bits, unless all its values are those of 8 bits.

    Raises:
        ValueError: naming a mode that has no such reading.
    """
    with reading(where, NEEDED):
        if image.mode in _SIXTEEN:
            values = sixteen(where, image)
            grey = (values // 257 if values.max() > 255 else values).astype(np.uint8)
            return np.stack([grey] * 3, -1)
        if image.mode not in _COLOURS:
            raise ValueError(
                f"{where}: a picture in grey or colour of 8 or 16 bits is needed; this one is {image.mode} in Pillow's words"
            )
        if image.mode in ("RGBa", "La"):
            image = image.convert(f"{image.mode[:-1]}A")
        return np.asarray(image.convert("RGB"))


def sixteen(where: object, image: Image.Image) -> np.ndarray:
    """Return the values `[H, W]` of a grey picture of more than 8 bits. Raises ValueError naming one that leaves 16 bits."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{where}: grey values from 0 to 65535 are needed; they go from {values.min()} to {values.max()}"
        )
    return values if image.mode == "I" else values.astype(np.uint16)
