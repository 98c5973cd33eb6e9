"""Read ReasonSeg as downloaded: photographs, each with a JSON file of sentences and polygons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from segrl.data.boundary import reading, validated
from segrl.data.pictures import SUFFIXES
from segrl.data.survey import Item, ItemDataset, Survey, by_stem, listed
from segrl.data.transforms import read_image
from segrl.types import Sample

_TARGET, _IGNORED = 1, 255
_FARTHEST = 32_767  # largest absolute coordinate: OpenCV's fixed-point numbers have 16 bits before the point


Coordinate = Annotated[float, Field(ge=-_FARTHEST, le=_FARTHEST, allow_inf_nan=False)]


class Shape(BaseModel):
    """One polygon. `draw` skips the label "flag"; regions whose label contains "ignore" are not scored."""

    label: str
    points: list[tuple[Coordinate, Coordinate]] = Field(min_length=1)


class Annotation(BaseModel):
    """Contents of one JSON file."""

    text: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """The question and its paraphrases; scores use the first one."""
    shapes: list[Shape]


def read_annotation(path: Path) -> Annotation:
    """Read a JSON file in UTF-8 or, as some of the published files are, cp1252.

    Raises:
        ValueError: if the file cannot be read or is not an annotation.
    """
    with reading(path, "must be JSON"):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("cp1252", errors="replace")
        said = json.loads(text)
    return validated(Annotation, said, f"{path}: ")


def _fill(canvas: np.ndarray, shape: Shape, value: int) -> None:
    """Draw a polygon, outline and inside, into `canvas`."""
    import cv2

    corners = [np.array(shape.points, np.int32)]
    cv2.polylines(canvas, corners, True, value, 1)
    cv2.fillPoly(canvas, corners, value)


def draw(shapes: list[Shape], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return target and ignored pixels, each bool `[height, width]`.

    As in LISA's `data_processing.py`: coordinates are truncated to integers, outline and inside are drawn,
    and polygons are drawn by decreasing area. A smaller one therefore covers a larger one, with either label.
    """
    drawn = [shape for shape in shapes if shape.label.lower() != "flag"]
    areas = []
    for shape in drawn:
        alone = np.zeros((height, width), np.uint8)
        _fill(alone, shape, 1)
        areas.append(int(alone.sum()))
    canvas = np.zeros((height, width), np.uint8)
    for place in np.argsort(areas, kind="stable")[::-1]:
        _fill(canvas, drawn[place], _IGNORED if "ignore" in drawn[place].label.lower() else _TARGET)
    return canvas == _TARGET, canvas == _IGNORED


def _read(image: Path, annotation: Annotation, sentence: int, name: str) -> Sample:
    """Read one sample with the EXIF rotation applied: the polygons were drawn on the rotated photograph."""
    pixels = read_image(image, upright=True)
    mask, ignore = draw(annotation.shapes, *pixels.shape[:2])
    return Sample(
        id=name,
        image=pixels,
        mask=mask,
        query=annotation.text[sentence].strip(),
        path=image,
        cluster=image.stem,
        ignore=ignore if ignore.any() else None,
    )


class ReasonSeg(ItemDataset):
    """A dataset of one sample per photograph, or per sentence.

    Ids are the stems of the photographs, followed by the number of the sentence if `every_sentence` is true.

    Args:
        root: folder that holds `train`, `val` and `test`.
        split: name of one of these folders.
        every_sentence: whether paraphrases are samples, too (for training); if not, only the first sentence.
        side: image and mask are resized to a square of this side; None keeps their size.

    Raises:
        ValueError: if the folder is missing or empty, files lack a partner or share a stem, or a JSON file is
            not an annotation. On access: if an image is unfit.
    """

    whole_split: ClassVar[Mapping[str, object]] = {"every_sentence": False}

    def __init__(self, root: str, split: str, every_sentence: bool, side: int | None) -> None:
        super().__init__(self.survey(root, split, every_sentence, side), side)

    @classmethod
    def survey(cls, root: str, split: str, every_sentence: bool, side: int | None) -> Survey:
        """List all items and faults; the JSON files are read, and `side` is ignored."""
        folder, found = Path(root) / split, Survey()
        if not folder.is_dir():
            found.faults.append(f"{root}: must hold a folder {split}; there is none (set the dataset's root)")
            return found
        files = listed(folder, {*SUFFIXES, ".json"}, found.unread, found.faults)
        images = by_stem((path for path in files if path.suffix.lower() != ".json"), found.faults)
        texts = by_stem((path for path in files if path.suffix.lower() == ".json"), found.faults)
        found.without_mask = sorted(set(images) - set(texts))
        found.without_image = sorted(set(texts) - set(images))
        for stem in sorted(set(images) & set(texts)):
            try:
                annotation = read_annotation(texts[stem])
            except ValueError as error:
                found.faults.append(str(error))
                continue
            for sentence in range(len(annotation.text) if every_sentence else 1):
                name = f"{stem}-{sentence}" if every_sentence else stem
                read = partial(_read, images[stem], annotation, sentence, name)
                found.items.append(Item(id=name, image=images[stem], read=read))
        return found.close(
            mask=f"{folder}: must hold a .json for every image",
            image=f"{folder}: must hold an image for every .json",
            empty=f"{folder}: must hold at least one image with its .json; the folder holds none",
        )
