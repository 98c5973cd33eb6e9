"""Read chat traces: Seg-R1's FCoT as downloaded (parquet shards that hold the images), or a JSONL file.

Each trace has `image`, `problem`, `thinking` and `solution`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from segrl.data.boundary import found_at, is_file, json_lines, reading, reason, validated
from segrl.data.survey import READABLE, Item, ItemDataset, Survey
from segrl.data.transforms import read_image
from segrl.prompts.frames import absolute_pixels
from segrl.protocols import Grammar
from segrl.types import Parsed, Sample

_COLUMNS = ("problem", "thinking", "solution")
_OPEN, _CLOSE = "<think>", "</think>"
_PLACE = re.compile(r"[\[(]\s{0,3}\d{1,5}(?:\.\d{1,5})?\s{0,3},\s{0,3}\d{1,5}")


class TraceLine(BaseModel):
    """One trace as stored."""

    image: str
    """File, relative to the folder of the JSONL; for a shard, a name made of shard and row."""
    problem: str = ""
    """The question that was asked; not used, because SFT asks with the grammar's messages, as RL does."""
    thinking: str
    """The thought, with or without think tags around it; FCoT has them."""
    solution: str
    """Boxes, points and labels as the grammar writes them, in pixels of the image."""
    query: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Location of a trace's image."""

    path: Path
    group: int | None = None
    """Row group of a parquet shard; None if the file is the image."""
    row: int = 0

    def content(self) -> bytes | None:
        """Return the image's bytes if it is in a shard, else None."""
        return None if self.group is None else _images(self.path, self.group)[self.row]


@lru_cache(maxsize=2)
def _images(shard: Path, group: int) -> list[bytes]:
    """Return the images' bytes of one row group, cached: neighbouring samples of a loader worker share it."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(shard).read_row_group(group, ["image"], use_threads=False)
        column = rows.column("image")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{shard}: row group {group}: must have a column `image` that can be read; {reason(error)}"
        ) from None
    return [(image or {}).get("bytes") or b"" for image in column.to_pylist()]


Traces = list[tuple[str, TraceLine, Stored]]
"""Traces in order, each with its place, such as `path, line 3`, and the place of its image."""


def _line(where: str, value: object) -> TraceLine:
    """Return a validated trace. Raise ValueError, naming its place and key, if it is malformed."""
    return validated(TraceLine, value, f"{where}: ")


def _read_lines(path: Path) -> tuple[Traces, list[str]]:
    """Return the traces of a `.jsonl`, and the faults of malformed lines."""
    lines, faults = json_lines(path, "must be a .jsonl of chat traces", _line)
    return [
        (f"{path}, line {number}", line, Stored(path=found_at(path.parent / line.image)))
        for number, line in lines
    ], faults


def _read_shards(shards: Sequence[Path]) -> tuple[Traces, list[str]]:
    """Return traces and faults of parquet shards, as `_read_lines` does; the images are not read."""
    import pyarrow
    import pyarrow.parquet

    traces: Traces = []
    faults: list[str] = []
    for shard in shards:
        try:
            file = pyarrow.parquet.ParquetFile(shard)
            groups = [
                file.read_row_group(g, list(_COLUMNS), use_threads=False).to_pylist()
                for g in range(file.num_row_groups)
            ]
        except (pyarrow.ArrowException, OSError) as error:
            faults.append(f"{shard}: must be a parquet shard of traces; it cannot be read ({error})")
            continue
        if missing := sorted({"image", *_COLUMNS} - set(file.schema_arrow.names)):
            faults.append(
                f"{shard}: must have the columns image, {', '.join(_COLUMNS)}; there is no {missing[0]}"
            )
            continue
        image = file.schema_arrow.field("image").type
        if not pyarrow.types.is_struct(image) or image.get_field_index("bytes") < 0:
            faults.append(f"{shard}: the column image must hold bytes; it holds {image}")
            continue
        number = 0
        for group, rows in enumerate(groups):
            for row, values in enumerate(rows):
                where = f"{shard}, row {number}"
                try:
                    line = _line(where, {"image": f"{shard.stem}-{number:05d}", **values})
                    traces.append((where, line, Stored(path=shard, group=group, row=row)))
                except ValueError as error:
                    faults.append(str(error))
                number += 1
    return traces, faults


def _thought(where: str, line: TraceLine) -> str:
    """Return a thought without the tags around it. Raise ValueError, naming the row, if tags are inside."""
    thought = line.thinking.strip()
    if thought.startswith(_OPEN) and thought.endswith(_CLOSE):
        thought = thought.removeprefix(_OPEN).removesuffix(_CLOSE).strip()
    for tag in (_OPEN, _CLOSE):
        if tag in thought:
            raise ValueError(
                f"{where}: thinking: must be one thought, with or without think tags around it; "
                f"got {tag} inside"
            )
    return thought


def names_places(thought: str) -> bool:
    """Return whether a thought names coordinates, such as (120, 48), which are never rescaled."""
    return _PLACE.search(thought) is not None


class ChatTraces(ItemDataset):
    """A dataset of samples with a trace and an empty mask.

    Args:
        path: a `.jsonl`, whose images are relative to its folder; a `.parquet`; or a folder of `.parquet`
            shards, at any depth, as Hugging Face publishes them.
        grammar: parses the solutions.
        side: images are resized to a square of this side; None keeps their size.

    Raises:
        ValueError: if `path` holds no traces, or a line or shard is malformed. On access: if the image cannot
            be read, the grammar cannot parse or render the solution, or the thought holds tags.
    """

    def __init__(self, path: str, grammar: Grammar, side: int | None) -> None:
        super().__init__(self.survey(path, grammar, side), side)

    @classmethod
    def survey(cls, path: str, grammar: Grammar, side: int | None) -> Survey:
        """List all traces and faults; no image is read, and `side` is ignored."""
        at = Path(path)
        shards = sorted(at.rglob("*.parquet")) if at.is_dir() else [at] if at.suffix == ".parquet" else []
        if not at.exists() or at.is_dir() and not shards:
            return Survey(
                faults=[
                    f"data.traces: must be a .jsonl or parquet shards of chat traces; there is no file {path}"
                ]
            )
        traces, faults = _read_shards(shards) if shards else _read_lines(at)
        found = Survey(faults=faults)
        for index, (where, line, stored) in enumerate(traces):
            if not is_file(stored.path):
                found.without_image.append(f"{where.rpartition(', ')[2]} ({line.image})")
                continue
            name = f"{Path(line.image).stem}-{index}"
            content = None if stored.group is None else partial(_images_at, stored)
            read = partial(_read, name, where, line, stored, grammar)
            found.items.append(Item(id=name, image=stored.path, content=content, read=read))
        return found.close(
            image=f"{path}: the image of every trace must exist",
            empty=f"{path}: must hold at least one trace; the file is empty",
        )


def _read(name: str, where: str, line: TraceLine, stored: Stored, grammar: Grammar) -> Sample:
    """Read one sample at its own size; its mask is empty.

    Raises:
        ValueError: if the grammar cannot parse the solution or render the trace, or the image is unfit.
    """
    with reading(where, READABLE):
        image = read_image(stored.path, content=stored.content(), upright=True)
        frame = absolute_pixels(*image.shape[:2])
        thought = _thought(where, line)
        said = grammar.parse(f"{_OPEN} {thought} {_CLOSE} {line.solution}", frame)
        if said.fault is not None:
            raise ValueError(f"{where}: solution: must be one that the grammar reads; {said.fault.value}")
        trace = replace(said, thought=thought)
        try:
            grammar.render(trace, frame)
        except ValueError as error:
            raise ValueError(f"{where}: must be a trace that the grammar can write; {error}") from None
        mask = np.zeros(image.shape[:2], bool)
        return Sample(id=name, image=image, mask=mask, query=line.query, trace=trace)


def _images_at(stored: Stored) -> bytes:
    """Return the bytes of an image in a shard."""
    content = stored.content()
    assert content is not None
    return content


class AsWritten:
    """A `Trace` that returns the dataset's own traces."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Parsed:
        """Return the sample's trace. Raise ValueError, naming the sample, if it has none."""
        if sample.trace is None:
            raise ValueError(
                f"{sample.id}: must have a trace to imitate; this dataset has none (stage.trace)"
            )
        return sample.trace
