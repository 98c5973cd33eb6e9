"""Turn exceptions of libraries that read foreign files into one ValueError that names the file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import normalize

from PIL import Image

_SEGRL = Path(__file__).resolve().parents[1]
_LONGEST = 200  # characters of a library's message that are shown

FAILURES = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""Exceptions that image decoders and parsers raise on damaged input. RuntimeError includes RecursionError."""


@contextmanager
def reading(where: object, needed: str) -> Iterator[None]:
    """Turn exceptions of `FAILURES` raised in the block into `ValueError("where: needed (reason)")`.

    A ValueError raised by segrl's own code passes unchanged.

    Args:
        where: file, row or sample id, for the message.
        needed: the expected content, for the message.

    Raises:
        ValueError: in place of the library's exception.
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
    """Return whether the innermost frame of the error is in segrl: its message is then written for users."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and Path(at.tb_frame.f_code.co_filename).resolve().is_relative_to(_SEGRL)


def reason(error: BaseException) -> str:
    """Return the error's message in one line, at most 200 characters, or its class name if it has none."""
    words = " ".join(str(error).split())
    return words[:_LONGEST] if words else type(error).__name__


def found_at(path: Path) -> Path:
    """Return the path under which the file exists, in any Unicode normalisation (as written, NFC, NFD).

    Each part of the path is tried in these forms. If nothing exists, return the path unchanged.
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
    """Return whether a file exists there; False if the name is not valid."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_text(value: object) -> bool:
    """Return whether a value is a str that UTF-8 can encode: one without surrogates."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
