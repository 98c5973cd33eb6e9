"""Write chat traces from masks: the answers that an annotator would have written, for a cold start (SFT)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from segrl.data.pictures import decoded, orientation, turned
from segrl.data.transforms import read_image
from segrl.geometry import components, inner_point, tight_box
from segrl.metrics.functional.overlap import iou
from segrl.prompts.frames import absolute_pixels
from segrl.protocols import Grammar, MaskHead, SampleSet
from segrl.types import MaskPrompt, Parsed, Sample

_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_SIZES = ((0.04, "tiny"), (0.10, "small"), (0.20, "medium"), (1.01, "large"))


class Annotator:
    """Writer of the trace of a mask: a template thought, and a box and an inner point per connected part.

    Human boxes are loose. Each side of a box is moved outwards by a random share of the box's extent, up to
    `looseness`. A policy that only imitates therefore stays loose, and RL with a mask reward can improve it.

    Args:
        looseness: in [0, 1); 0 gives tight boxes.
        grid: coordinates are rounded to multiples of 1/grid of the image's side.
        most_parts: largest number of parts that are described. Parts below 0.5 % of the image are left out,
            unless all are smaller: then the largest is described.
    """

    def __init__(self, looseness: float, grid: int, most_parts: int) -> None:
        self.looseness, self.grid, self.most_parts = looseness, grid, most_parts

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Parsed:
        """Return the trace of a sample. Raise ValueError, naming the sample, if its mask is empty."""
        if not sample.mask.any():
            raise ValueError(f"{sample.id}: must have an object to write a trace of; its mask is empty")
        return self.annotate(sample.mask, rng)

    def annotate(self, mask: np.ndarray, rng: np.random.Generator) -> Parsed:
        """Return the trace of a mask bool `[H, W]`; `rng` draws the looseness of each side.

        Raises:
            ValueError: if the mask is empty.
        """
        parts = components(mask, least=0.005, most=self.most_parts)
        if not parts:
            raise ValueError("must have an object to write a trace of; the mask is empty")
        boxes = [self._loosen(tight_box(part), rng) for part in parts]
        points = [self._inside(part) for part in parts]
        return Parsed(
            thought=self._thought(parts, points), prompt=MaskPrompt.of(boxes, points, [1] * len(points))
        )

    def _snap(self, values: np.ndarray) -> np.ndarray:
        """Round values to multiples of 1/grid."""
        return np.rint(values * self.grid) / self.grid

    def _inside(self, part: np.ndarray) -> np.ndarray:
        """Return the innermost point `[2]`, rounded to the grid if the rounded point is still in the part."""
        exact = inner_point(part)
        snapped = self._snap(exact)
        column, row = np.minimum(snapped * part.shape[::-1], np.array(part.shape[::-1]) - 1).astype(int)
        return snapped if part[row, column] else exact

    def _loosen(self, box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Move each side outwards by a random share and round; a side stays at least 1/grid long."""
        extent = np.tile(box[2:] - box[:2], 2)
        outwards = np.array([-1, -1, 1, 1]) * extent * rng.uniform(0, self.looseness, 4)
        moved = self._snap(np.clip(box + outwards, 0, 1))
        moved[2:] = np.maximum(moved[2:], moved[:2] + 1 / self.grid)
        moved[:2] = np.minimum(moved[:2], 1 - 1 / self.grid)
        return np.clip(moved, 0, 1)

    def _thought(self, parts: list[np.ndarray], points: list[np.ndarray]) -> str:
        """Return a sentence such as `A small object, top left.` for each part, joined by spaces."""
        sentences = []
        for part, (x, y) in zip(parts, points, strict=True):
            size = next(name for bound, name in _SIZES if part.mean() < bound)
            row, column = _ROWS[min(int(y * 3), 2)], _COLUMNS[min(int(x * 3), 2)]
            sentences.append(f"A {size} object, {row} {column}.")
        return " ".join(sentences)


@dataclass(slots=True, kw_only=True)
class Judged:
    """The traces written so far, and the numbers of samples that were left out."""

    lines: list[dict[str, str]] = field(default_factory=list)
    empty: int = 0
    """Samples with an empty mask."""
    unsolved: int = 0
    """Traces whose mask prompt gives a mask below the required IoU."""

    @property
    def seen(self) -> int:
        """Number of samples that were judged."""
        return len(self.lines) + self.empty + self.unsolved

    def add(self, one: dict[str, str] | str) -> None:
        """Add a trace (a dict), or count why there is none: "empty" or "unsolved"."""
        if isinstance(one, dict):
            self.lines.append(one)
        elif one == "empty":
            self.empty += 1
        else:
            self.unsolved += 1


def written(
    samples: SampleSet,
    head: MaskHead,
    grammar: Grammar,
    annotate: Annotator,
    least_iou: float,
    judged: Judged,
) -> Iterator[dict[str, str] | str]:
    """Yield, for every sample after the first `judged.seen`, its trace or the reason why it is left out.

    A trace is a dict with `image` (a path), `problem`, `thinking` and `solution`. The reason is "empty" if
    the mask is empty, and "unsolved" if the mask head's mask has an IoU below `least_iou`.

    Raises:
        ValueError: if samples were not read from files, or a file is unfit.
    """
    asked = grammar.messages(None)[-1]["content"]
    assert isinstance(asked, list)
    problem = next(part["text"] for part in asked if part["type"] == "text")
    for index in range(judged.seen, len(samples)):
        sample = samples[index]
        if sample.path is None:
            raise ValueError(
                "data: must be a dataset of image files to write traces of; this one is generated"
            )
        if not sample.mask.any():
            yield "empty"
            continue
        image, mask = as_read_back(sample)
        frame = absolute_pixels(*mask.shape)
        text = grammar.render(annotate.annotate(mask, np.random.default_rng(index)), frame)
        said = grammar.parse(text, frame)
        ((drawn,),) = head.segment([image], [[said.prompt]])
        if iou(drawn, mask) < least_iou:
            yield "unsolved"
            continue
        solution = text.partition("</think>")[2].strip() or text
        yield {"image": str(sample.path), "problem": problem, "thinking": said.thought, "solution": solution}


def as_read_back(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Return the image with its EXIF rotation applied, and the mask in the same frame.

    `ChatTraces` always applies the rotation, so the coordinates of a trace must be in that frame. A mask that
    fits the photograph as stored is rotated with it.
    """
    assert sample.path is not None
    upright = read_image(sample.path, upright=True)
    if np.array_equal(upright, sample.image):
        return sample.image, sample.mask
    turn = orientation(decoded(sample.path))
    mask = np.asarray(turned(Image.fromarray(sample.mask.astype(np.uint8)), turn)) > 0
    return upright, mask
