"""The one boundary around files from elsewhere: whatever a library raises while it reads becomes one ValueError with a name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import normalize

from PIL import Image

_SEGRL = Path(__file__).resolve().parents[1]
_LONGEST = 200  # letters of a library's message that are shown

FAILURES = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""Exceptions that image decoders and parsers raise on damaged input. RuntimeError includes RecursionError."""


@contextmanager
def reading(where: object, needed: str) -> Iterator[None]:
    """Turn what a library raises inside into `ValueError("where: needed (reason)")`; segrl's own refusals pass as they are.

    Args:
        where: file, row or id of the sample that is read.
        needed: what was expected there.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{where}: {needed}; there is no such file") from None
    except FAILURES as error:
        if isinstance(error, ValueError) and _raised_by_segrl(error):
            raise
        raise ValueError(f"{where}: {needed} ({reason(error)})") from None


def _raised_by_segrl(error: BaseException) -> bool:
    """Return whether segrl's own code raised the error: its message is then written for the user."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and Path(at.tb_frame.f_code.co_filename).resolve().is_relative_to(_SEGRL)


def reason(error: BaseException) -> str:
    """Return a library's message in one line, or the error's name where it has none."""
    words = " ".join(str(error).split())
    return words[:_LONGEST] if words else type(error).__name__


def found_at(path: Path) -> Path:
    """Return the path under which the file exists: as it is written, or with letters of its parts composed or taken apart.

    A path under which nothing exists, or that no file can have, is returned as it is.
    """
    if is_file(path):
        return path
    at = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        forms = [at / form for form in dict.fromkeys((part, normalize("NFC", part), normalize("NFD", part)))]
        if (there := next((form for form in forms if _exists(form)), None)) is None:
            return path
        at = there
    return at


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_file(path: Path) -> bool:
    """Return whether a file exists there; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_text(value: object) -> bool:
    """Return whether a value is text that can be written: JSON and file systems also know halves of letters."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
