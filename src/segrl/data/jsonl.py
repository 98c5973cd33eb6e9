"""Read any dataset from a JSONL file: each line has `image`, `mask` and, optionally, `query` and `id`."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from segrl.data.boundary import found_at, is_file, reading
from segrl.data.survey import Piece, Pieces, Survey, first_names
from segrl.data.transforms import check_pair, read_pair
from segrl.types import Sample


class Line(BaseModel):
    """One line of the list."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    image: str = Field(min_length=1)
    """File, relative to the root."""
    mask: str = Field(min_length=1)
    """File, relative to the root."""
    query: str | None = None
    """The object to segment; None if the task's constant instruction suffices."""
    id: str | None = None
    """Unique id. If None: the image's stem, and the 0-based line number if several lines have that stem."""


def _line(path: Path, number: int, text: bytes) -> Line:
    """Return a validated line. Raise ValueError, naming the line, if it is malformed or misspells a key."""
    try:
        with reading(f"{path}, line {number}", "JSON is needed"):
            said = json.loads(text)
        for key in said if isinstance(said, dict) else ():
            meant = difflib.get_close_matches(key, set(Line.model_fields) - set(said), n=1, cutoff=0.85)
            if key not in Line.model_fields and meant:
                raise ValueError(f"{path}, line {number}: {key}: no such key; did you mean {meant[0]}?")
        return Line.model_validate(said)
    except ValidationError as error:
        found = error.errors()[0]
        key = "".join(f"{part}: " for part in found["loc"])
        raise ValueError(f"{path}, line {number}: {key}{found['msg'].lower()}") from None


def _read(image: Path, mask: Path, line: Line, name: str) -> Sample:
    """Read one sample at its own size; lines with the same image form one cluster."""
    return replace(read_pair(image, mask, line.query), id=name, cluster=line.image)


class JsonlDataset(Pieces):
    """A dataset of one sample per line of a `.jsonl`.

    Args:
        path: the list, in UTF-8.
        root: folder that its files are relative to; if None, the folder of the list.
        side: image and mask are resized to a square of this side; None keeps their size.

    Raises:
        ValueError: if the list is missing or empty, a line is malformed, an id is not unique, or a file is
            missing or unfit. On access: if a file is found unfit only when it is decoded.
    """

    def __init__(self, path: str | None, root: str | None, side: int | None) -> None:
        found = self.survey(path, root, side)
        if found.faults:
            raise ValueError(found.faults[0])
        if found.without_image or found.without_mask:
            lost = first_names(found.without_image + found.without_mask)
            raise ValueError(f"{path}: files that are there are needed; there is none for {lost}")
        for piece in found.pieces:
            assert piece.mask is not None
            check_pair(piece.image, piece.mask)
        super().__init__(found.pieces, side)

    @classmethod
    def survey(cls, path: str | None, root: str | None, side: int | None) -> Survey:
        """List all samples and faults; `side` is ignored."""
        at, found, lines = Path(path or ""), Survey(), dict[int, Line]()
        if path is None or not is_file(at):
            found.faults.append(f"{path}: a .jsonl of image, mask and query is needed; there is no such file")
            return found
        with reading(at, "a .jsonl of image, mask and query is needed"):
            content = at.read_bytes()
        for number, text in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if text.strip():
                try:
                    lines[number] = _line(at, number, text)
                except ValueError as error:
                    found.faults.append(str(error))
        base, seen = at.parent if root is None else Path(root), set[str]()
        stems = Counter(Path(line.image).stem for line in lines.values())
        for number, line in lines.items():
            stem = Path(line.image).stem
            name = line.id or (stem if stems[stem] == 1 else f"{stem}-{number - 1}")
            if name in seen:
                found.faults.append(f"{at}, line {number}: an id of its own is needed; {name} is there twice")
            seen.add(name)
            image, mask = found_at(base / line.image), found_at(base / line.mask)
            if not is_file(image):
                found.without_image.append(f"line {number} ({line.image})")
            elif not is_file(mask):
                found.without_mask.append(f"line {number} ({line.mask})")
            else:
                read = partial(_read, image, mask, line, name)
                found.pieces.append(Piece(id=name, image=image, mask=mask, read=read))
        if not seen and not found.faults:
            found.faults.append(f"{path}: at least one sample is needed; the file is empty")
        return found
