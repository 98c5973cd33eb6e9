"""Rewards of the text alone."""

from __future__ import annotations

import math

from segrl.types import Answer, ParseFault, Sample

_UNREASONED = {ParseFault.NO_THOUGHT, ParseFault.NO_ANSWER}


def well_formed(answer: Answer, sample: Sample) -> float:
    """1 for a sentence of the grammar that ends with its answer, 0 for a fault or for rambling on behind it."""
    return 0.0 if answer.parsed.fault or answer.parsed.rest else 1.0


def parses(answer: Answer, sample: Sample) -> float:
    """1 for whatever can be read, 0 for a fault: Seg-R1's `format_reward`, which does not look behind the answer."""
    return 0.0 if answer.parsed.fault else 1.0


def reasoned(answer: Answer, sample: Sample) -> float:
    """1 if there are a closed thought and a closed answer, whatever the answer holds (the "reasoning format" of SAM-R1)."""
    return 0.0 if answer.parsed.fault in _UNREASONED or answer.parsed.rest else 1.0


def unrepeated(answer: Answer, sample: Sample) -> float:
    """0 if two or more sentences of the thought say what another has said, else 1 (VisionReasoner's non-repeat reward)."""
    sentences = [s for s in (part.strip() for part in answer.parsed.thought.split(".")) if s]
    return 0.0 if len(sentences) - len(set(sentences)) >= 2 else 1.0


def overlong(answer: Answer, sample: Sample, *, budget: int, margin: int) -> float:
    r"""1 up to `budget - margin` tokens, falling to 0 at `budget`: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), plus 1.

    A completion that was cut off earns nothing.
    """
    if not answer.finished:
        return 0.0
    return min(1.0, max(0.0, (budget - answer.length) / margin))


def point_count(answer: Answer, sample: Sample, *, ideal: float, width: float) -> float:
    r"""\( e^{-(Q - ideal)^2 / (2\,width^2)} \) for Q points (Seg-R1's `length_reward`: 8 and 2; registered there, unused)."""
    prompt = answer.parsed.prompt
    if prompt is None:
        return 0.0
    return math.exp(-((len(prompt.points) - ideal) ** 2) / (2 * width**2))
