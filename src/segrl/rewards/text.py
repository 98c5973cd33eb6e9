"""Rewards of the text alone."""

from __future__ import annotations

import math

from segrl.types import Answer, ParseFault, Sample

# Two thoughts, or two answers, are no thought and no answer.
_UNREASONED = {ParseFault.NO_THOUGHT, ParseFault.NO_ANSWER, ParseFault.DUPLICATE_FIELD}


def well_formed(answer: Answer, sample: Sample) -> float:
    """Return 1 for a sentence of the grammar and nothing beside it, 0 for a fault, a loose reading, or rambling on behind it."""
    parsed = answer.parsed
    return 0.0 if parsed.fault or parsed.loose or parsed.rest else 1.0


def parses(answer: Answer, sample: Sample) -> float:
    """Return 1 for whatever is read as written, 0 else: Seg-R1's `format_reward`, which does not look behind the answer."""
    return 0.0 if answer.parsed.fault or answer.parsed.loose else 1.0


def objects_formed(answer: Answer, sample: Sample) -> float:
    """Return the share of the answer's boxes and points that have the right shape, 0 where it rambles on (VisionReasoner's).

    The released code pays twice this share, whatever stands beside the answer; and 0 for no object, which pays 1 here.
    """
    parsed = answer.parsed
    if parsed.rest:
        return 0.0
    return parsed.partly if parsed.fault or parsed.loose else 1.0


def reasoned(answer: Answer, sample: Sample) -> float:
    """Return 1 for one closed thought, one answer, whatever it holds, and nothing beside them (SAM-R1's "reasoning format")."""
    return 0.0 if answer.parsed.fault in _UNREASONED or answer.parsed.rest else 1.0


def unrepeated(answer: Answer, sample: Sample) -> float:
    """Return 0 if two or more sentences of the whole completion say what another has said, else 1 (VisionReasoner's non-repeat)."""
    sentences = [s for s in (part.strip() for part in answer.text.split(".")) if s]
    return 0.0 if len(sentences) - len(set(sentences)) >= 2 else 1.0


def overlong(answer: Answer, sample: Sample, *, budget: int, margin: float | None) -> float:
    """Return 1 up to `budget - margin` tokens, falling to 0 at `budget`; a completion that was cut off earns nothing.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), plus 1.

    Args:
        answer: to be paid.
        sample: not looked at.
        budget: tokens that a completion may have.
        margin: tokens in which the reward falls; None takes a fifth of the budget, as DAPO (4,096 of 20,480).
    """
    if not answer.finished:
        return 0.0
    return min(1.0, max(0.0, (budget - answer.length) / (budget / 5 if margin is None else margin)))


def point_count(answer: Answer, sample: Sample, *, ideal: float, width: float) -> float:
    r"""\( e^{-(Q - ideal)^2 / (2\,width^2)} \) for Q points (Seg-R1's `length_reward`: 8 and 2; registered there, unused)."""
    prompt = answer.parsed.prompt
    if prompt is None:
        return 0.0
    return math.exp(-((len(prompt.points) - ideal) ** 2) / (2 * width**2))
