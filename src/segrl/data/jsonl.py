"""Read any dataset from a JSONL file: each line has `image`, `mask` and, optionally, `query` and `id`."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from segrl.data.boundary import found_at, is_file, json_lines, validated
from segrl.data.survey import Item, ItemDataset, Survey
from segrl.data.transforms import check_pair, read_pair
from segrl.types import Sample


class SampleLine(BaseModel):
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


def _line(where: str, value: object) -> SampleLine:
    """Return a validated line. Raise ValueError, naming the line, if it is malformed or misspells a key."""
    given = value if isinstance(value, dict) else {}
    for key in given:
        meant = difflib.get_close_matches(key, set(SampleLine.model_fields) - set(given), n=1, cutoff=0.85)
        if key not in SampleLine.model_fields and meant:
            raise ValueError(f"{where}: {key}: there is no such key; did you mean {meant[0]}?")
    return validated(SampleLine, value, f"{where}: ")


def _read(image: Path, mask: Path, line: SampleLine, name: str) -> Sample:
    """Read one sample at its own size; lines with the same image form one cluster."""
    return replace(read_pair(image, mask, line.query), id=name, cluster=line.image)


class JsonlDataset(ItemDataset):
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
        super().__init__(self.survey(path, root, side), side)

    @classmethod
    def survey(cls, path: str | None, root: str | None, side: int | None) -> Survey:
        """List all items and faults; `side` is ignored."""
        at, needed = Path(path or ""), "must be a .jsonl of image, mask and query"
        if path is None or not is_file(at):
            return Survey(faults=[f"{path}: {needed}; there is no such file"])
        lines, faults = json_lines(at, needed, _line)
        base, seen, found = at.parent if root is None else Path(root), set[str](), Survey(faults=faults)
        stems = Counter(Path(line.image).stem for _, line in lines)
        for number, line in lines:
            stem = Path(line.image).stem
            name = line.id or (stem if stems[stem] == 1 else f"{stem}-{number - 1}")
            if name in seen:
                found.faults.append(f"{at}, line {number}: id must be unique; {name} occurs twice")
            seen.add(name)
            image, mask = found_at(base / line.image), found_at(base / line.mask)
            if not is_file(image):
                found.without_image.append(f"line {number} ({line.image})")
            elif not is_file(mask):
                found.without_mask.append(f"line {number} ({line.mask})")
            else:
                read, check = partial(_read, image, mask, line, name), partial(check_pair, image, mask)
                found.items.append(Item(id=name, image=image, mask=mask, read=read, check=check))
        return found.close(
            mask=f"{path}: the mask of every line must exist",
            image=f"{path}: the image of every line must exist",
            empty=f"{path}: must hold at least one sample; the file is empty",
        )
