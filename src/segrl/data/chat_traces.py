"""Chat traces on the disk: one JSON object per line with `image`, `problem`, `thinking`, `solution`, as in Seg-R1's FCoT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError
from torch.utils.data import Dataset

from segrl.data.transforms import read_image, squash
from segrl.prompts.frames import absolute_pixels
from segrl.protocols import Grammar
from segrl.types import Parsed, Sample


class Line(BaseModel):
    """One trace."""

    image: str
    """File, relative to the folder of the traces."""
    problem: str = ""
    """What was asked; the grammar asks in its own words, so that SFT asks as RL does."""
    thinking: str
    solution: str
    """Boxes, points and labels in the grammar's words, in pixels of the image."""
    query: str | None = None


class ChatTraces(Dataset[Sample]):
    """Samples with a trace and no mask.

    Args:
        path: `.jsonl` file; images are found relative to its folder.
        grammar: reads the solutions.
        side: resize images to this square; none leaves them as they are.

    Raises:
        ValueError: naming file and line, if a line is no trace; on access, if its solution is no sentence of the grammar.
    """

    def __init__(self, path: str, grammar: Grammar, side: int | None) -> None:
        self.path, self.grammar, self.side = Path(path), grammar, side
        if not self.path.is_file():
            raise ValueError(f"data.traces: a .jsonl of chat traces is needed; there is no file {path}")
        self.lines = [
            self._line(number, text)
            for number, text in enumerate(self.path.read_text().splitlines(), 1)
            if text.strip()
        ]
        if not self.lines:
            raise ValueError(f"{path}: at least one trace is needed; the file is empty")

    def _line(self, number: int, text: str) -> Line:
        try:
            return Line.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {number}: JSON is needed; {error}") from None
        except ValidationError as error:
            found = error.errors()[0]
            raise ValueError(
                f"{self.path}, line {number}: {'.'.join(map(str, found['loc']))}: {found['msg'].lower()}"
            ) from None

    def __len__(self) -> int:
        """Number of traces."""
        return len(self.lines)

    @property
    def ids(self) -> list[str]:
        """Of all samples, in order."""
        return [f"{Path(line.image).stem}-{i}" for i, line in enumerate(self.lines)]

    def __getitem__(self, index: int) -> Sample:
        """Read one; its mask is empty."""
        line = self.lines[index]
        image = read_image(self.path.parent / line.image)
        frame = absolute_pixels(*image.shape[:2])
        said = self.grammar.parse(f"<think> {line.thinking} </think> {line.solution}", frame)
        if said.fault is not None:
            raise ValueError(
                f"{self.path}, line {index + 1}: a solution that the grammar reads is needed; {said.fault.value}"
            )
        sample = Sample(
            id=f"{Path(line.image).stem}-{index}", image=image, mask=np.zeros(image.shape[:2], bool), query=line.query,
            trace=replace(said, thought=line.thinking.strip()),
        )  # fmt: skip
        return sample if self.side is None else squash(sample, self.side)


class AsWritten:
    """Imitates the dataset's own traces."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Parsed:
        """The sample's trace; raises ValueError naming a sample that has none."""
        if sample.trace is None:
            raise ValueError(
                f"{sample.id}: a sample with a trace is needed to imitate it; this dataset has none (stage.trace)"
            )
        return sample.trace
