"""Read annotations in COCO's format.

Refs are a pickle of plain data or JSON. Polygons and run lengths are drawn as bool masks.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from segrl.data.boundary import is_file, is_text, reading, short

_KEYS = {"ref_id", "ann_id", "image_id", "split", "sentences"}
_LONGEST = 1_000_000  # pixels of one outline; pycocotools upsamples it five times
_FARTHEST = 100_000  # largest absolute coordinate, in pixels
_RUNS = re.compile(rb"[0-o]*")  # alphabet of COCO's compressed run lengths


class _Plain(pickle.Unpickler):
    """An unpickler of lists, dicts, strings and numbers that refuses every global."""

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401 - the base's signature
        """Raise UnpicklingError: a global could be called."""
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


# Opcode -> bytes of its argument, None if there is no such opcode. As in pickletools, negative values
# stand for arguments of variable length.
_WIDTHS: list[int | None] = [None] * 256
for _op in pickletools.opcodes:
    _WIDTHS[ord(_op.code)] = 0 if _op.arg is None else _op.arg.n
_LENGTHS = {  # bytes of the length field
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip
_LINES = {ord("c"): 2, ord("i"): 2}  # lines of the arguments of GLOBAL and INST: module, class
_PUT, _LONG_BINPUT, _STOP = ord("p"), ord("r"), ord(".")


def _check_places(content: bytes) -> None:
    """Raise ValueError if a pickle stores an object at a memo index beyond its own length.

    Python's unpickler would first allocate a memo of that size. An unknown opcode, and an argument whose
    line does not end, raise ValueError, too.
    """
    at, end, place = 0, len(content), 0
    while at < end:
        code = content[at]
        width = _WIDTHS[code]
        at += 1
        if width is None:
            raise ValueError(f"no pickle has {code:#04x} there")
        if width >= 0:
            if code == _LONG_BINPUT:
                place = int.from_bytes(content[at : at + 4], "little")
            elif code == _STOP:
                return
            at += width
        elif width == pickletools.UP_TO_NEWLINE:
            for _ in range(_LINES.get(code, 1)):
                begin, at = at, content.find(b"\n", at) + 1
                if at == 0:
                    raise ValueError("it was cut off")
            if code == _PUT:
                place = int(content[begin : begin + 20])
        else:
            length = _LENGTHS[width]
            at += length + int.from_bytes(content[at : at + length], "little")
        if place > end:
            raise ValueError(f"it puts something at place {place} and has {end} bytes")


def read_refs(path: Path) -> list[dict[str, Any]]:
    """Return the refs in a Python 2 pickle or a JSON file.

    Raises:
        ValueError: if the file is missing, damaged, or not plain data, or a ref lacks a key or holds a value
            of a wrong type. The message names the file.
    """
    if not is_file(path):
        raise ValueError(
            f"data: must have a refs file; there is no {path} (set data.root, or the root of the test set)"
        )
    needed = "must be a file of plain data; it cannot be read"
    with reading(path, needed):
        content = path.read_bytes()
        if path.suffix == ".json":
            refs = json.loads(content)
        else:
            try:
                _check_places(content)
                refs = _Plain(BytesIO(content), encoding="latin1").load()
            except (pickle.UnpicklingError, ValueError) as error:
                raise ValueError(f"{path}: {needed} ({error})") from None
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and ref.keys() >= _KEYS for ref in refs):
        raise ValueError(
            f"{path}: must be a list of refs with {', '.join(sorted(_KEYS))}; "
            "it is no list, or a ref lacks a key"
        )
    for place, ref in enumerate(refs):
        if fault := _fault(ref):
            raise ValueError(f"{path}: ref {place + 1} of {len(refs)}: {fault}")
    return refs


def _fault(ref: dict[str, Any]) -> str | None:
    """Return what is wrong with a ref, naming the key, or None if all values have their types."""
    named = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    for key, values in (("ref_id", [ref["ref_id"]]), ("image_id", [ref["image_id"]]), ("ann_id", named)):
        if not all(is_id(value) for value in values):
            return f"{key}: must be a number or a name; got {short(ref[key])}"
    if not isinstance(ref["split"], str):
        return f"split: must be a name; got {short(ref['split'])}"
    if not isinstance(ref["sentences"], list):
        return f"sentences: must be a list; got {short(ref['sentences'])}"
    for sentence in ref["sentences"]:
        if (
            not isinstance(sentence, dict)
            or not is_id(sentence.get("sent_id"))
            or not is_text(sentence.get("sent"))
        ):
            return f"sentences: each must have sent_id and sent; got {short(sentence)}"
    return None


def is_id(value: object) -> bool:
    """Return whether a value can be an id: an int, or text that UTF-8 can encode."""
    return isinstance(value, int) or is_text(value)


def read_instances(path: Path) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Return the annotations and the images of COCO's `instances.json`, each by id.

    Raises:
        ValueError: if the file cannot be read, or an image lacks a file name or a positive height and width.
    """
    with reading(path, "must hold COCO's annotations; it holds none"):
        coco = json.loads(path.read_bytes())
        objects = {a["id"]: a for a in coco["annotations"]}
        pictures = {i["id"]: i for i in coco["images"]}
    for number, picture in pictures.items():
        sides = (picture.get("height"), picture.get("width"))
        if not is_text(picture.get("file_name")) or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(
                f"{path}: image {number}: must have file_name, a text, and height and width, whole numbers "
                f"above 0; got {short([picture.get('file_name'), *sides])}"
            )
    return objects, pictures


def read_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:  # noqa: ANN401 - a union
    """Return COCO's polygons or run lengths as one bool mask `[height, width]`.

    The mask is the union of the polygons. Polygons with fewer than three corners are ignored.

    Raises:
        ValueError: if no polygon has three corners, a coordinate is not a number or is more than 100,000
            pixels from 0, an outline is longer than 1,000,000 pixels, or run lengths are malformed or of
            another size.
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, height, width)
    if not isinstance(segmentation, list):
        raise ValueError(f"must be polygons or run lengths; got {short(segmentation)}")
    from pycocotools import mask

    polygons = [_corners(part) for part in segmentation]
    drawn = [part.tolist() for part in polygons if len(part) >= 6]
    if not drawn:
        raise ValueError(f"must have a polygon of at least three corners; got {short(segmentation)}")
    encoded = mask.merge(mask.frPyObjects(drawn, height, width))
    return np.ascontiguousarray(mask.decode(encoded)).astype(bool)


def _corners(part: Any) -> np.ndarray:  # noqa: ANN401 - one entry of a list
    """Return the n corners of a polygon as float64 `[2n]`; raise ValueError if it is malformed."""
    if not isinstance(part, list) or not all(type(value) in (int, float) for value in part):
        raise ValueError(f"a polygon must be a list of numbers; got {short(part)}")
    if len(part) % 2:
        raise ValueError(f"a polygon must have two numbers for each corner; got {len(part)}")
    if not all(abs(value) <= _FARTHEST for value in part):  # False for NaN, too
        raise ValueError(f"coordinates must be within {_FARTHEST} pixels; got {short(part)}")
    corners = np.array(part, np.float64)
    if np.abs(np.diff(corners.reshape(-1, 2), axis=0, append=corners.reshape(-1, 2)[:1])).sum() > _LONGEST:
        raise ValueError(f"an outline must be of at most {_LONGEST} pixels; got {short(part)}")
    return corners


def _from_runs(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Return the mask bool `[height, width]` of run lengths in column-major order, background first.

    `counts` is a list, or COCO's compressed text. Raise ValueError if the runs do not fill the mask.
    """
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        raise ValueError(f"run lengths must be of {height} rows and {width} columns; got size {short(size)}")
    if isinstance(counts, str | bytes):
        counts = _uncompressed(counts if isinstance(counts, bytes) else counts.encode())
    runs = counts if isinstance(counts, list) else []
    whole = all(type(run) is int and 0 <= run <= height * width for run in runs)
    if not whole or sum(runs) != height * width:
        raise ValueError(f"run lengths must add up to {height * width} pixels; got {short(counts)}")
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def _uncompressed(text: bytes) -> list[int]:
    """Return the run lengths in COCO's compressed text.

    A character holds five bits. From the fourth run on, a value is the difference to the run two before it.
    Raise ValueError for another character, a value of more than 13 characters, or a text that is cut off.
    """
    if not _RUNS.fullmatch(text):
        raise ValueError(f"must be COCO's text of run lengths; got {short(text)}")
    runs: list[int] = []
    value, shift = 0, 0
    for letter in text:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 60:
                raise ValueError(f"run lengths must have at most 13 characters each; got {short(text)}")
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError(f"run lengths must be whole; {short(text)} was cut off")
    return runs
