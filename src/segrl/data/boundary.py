"""Read foreign files: an exception of a library becomes one ValueError that names the file."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unicodedata import normalize

from PIL import Image
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)

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
        needed: what the content must be, for the message.

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


def short(value: object) -> str:
    """Return a value shortened for an error message: four entries of a list, 40 characters of a scalar."""
    if isinstance(value, list):
        return f"[{', '.join(short(one) for one in value[:4])}{', ...' if len(value) > 4 else ''}]"
    return repr(value)[:40] if isinstance(value, str | bytes | int | float | None) else type(value).__name__


def validated(model: type[Model], value: object, where: str) -> Model:
    """Return the value as the model.

    Args:
        model: the keys and their types.
        value: as read from a file.
        where: what the message begins with: the place of the value, up to its keys.

    Raises:
        ValueError: with the first wrong key, what it must be, and what came.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
    key, got = ".".join(map(str, first["loc"])), f"; got {short(first['input'])}"
    if first["type"] == "extra_forbidden":
        raise ValueError(f"{where}{key}: there is no such key (there are: {', '.join(model.model_fields)})")
    needed = first["msg"].lower().replace("field required", "must be given").replace("input should", "must")
    raise ValueError(f"{where}{key}{': ' * bool(key)}{needed}{got if first['type'] != 'missing' else ''}")


def json_lines(
    path: Path, needed: str, parse: Callable[[str, object], Model]
) -> tuple[list[tuple[int, Model]], list[str]]:
    """Read a file of JSON lines in UTF-8, with or without a byte order mark; empty lines are skipped.

    Args:
        path: the file.
        needed: what the file must be, for the message.
        parse: validates a line, given its place (`path, line number`) and its value; raises ValueError.

    Returns:
        The lines, each behind its number from 1, and the faults.
    """
    lines, faults = [], []
    try:
        with reading(path, needed):
            content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except ValueError as error:
        return [], [str(error)]
    for number, text in enumerate(content.split(b"\n"), 1):
        if text.strip():
            where = f"{path}, line {number}"
            try:
                with reading(where, "must be JSON"):
                    value = json.loads(text)
                lines.append((number, parse(where, value)))
            except ValueError as error:
                faults.append(str(error))
    return lines, faults


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
