"""Rewards of the text alone."""

from __future__ import annotations

import math

from segrl.types import Answer, Sample


def well_formed(answer: Answer, sample: Sample) -> float:
    """1 for a sentence of the grammar that ends with its answer, 0 for a fault or for rambling on behind it."""
    return 0.0 if answer.parsed.fault or answer.parsed.rest else 1.0


def parses(answer: Answer, sample: Sample) -> float:
    """1 for whatever can be read, 0 for a fault: Seg-R1's `format_reward`, which does not look behind the answer."""
    return 0.0 if answer.parsed.fault else 1.0


def point_count(answer: Answer, sample: Sample, *, ideal: float, width: float) -> float:
    r"""\( e^{-(Q - ideal)^2 / (2\,width^2)} \) for Q points (Seg-R1's `length_reward`: 8 and 2; registered there, unused)."""
    prompt = answer.parsed.prompt
    if prompt is None:
        return 0.0
    return math.exp(-((len(prompt.points) - ideal) ** 2) / (2 * width**2))
