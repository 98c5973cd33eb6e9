"""Rewards of the text alone."""

from __future__ import annotations

import math

from segrl.types import Answer, ParseFault, Sample

# DUPLICATE_FIELD: two thoughts, two answers, or, in Seg-R1's tags, two lists of points or labels.
_UNREASONED = {ParseFault.NO_THOUGHT, ParseFault.NO_ANSWER, ParseFault.DUPLICATE_FIELD}


def well_formed(answer: Answer, sample: Sample) -> float:
    """Return 0 for a fault, a loose answer, or extra text (`Parsed.rest`), else 1."""
    parsed = answer.parsed
    return 0.0 if parsed.fault or parsed.loose or parsed.rest else 1.0


def parses(answer: Answer, sample: Sample) -> float:
    """Return 0 for a fault or a loose answer, else 1: Seg-R1's `format_reward`, which ignores extra text."""
    return 0.0 if answer.parsed.fault or answer.parsed.loose else 1.0


def objects_formed(answer: Answer, sample: Sample) -> float:
    """Return the share of the answer's boxes and points that have the right shape; 0 if there is extra text.

    Source: VisionReasoner, whose released code pays twice this share, also if there is extra text. It pays 0
    for an answer without objects, which pays 1 here.
    """
    parsed = answer.parsed
    if parsed.rest:
        return 0.0
    return parsed.partly if parsed.fault or parsed.loose else 1.0


def reasoned(answer: Answer, sample: Sample) -> float:
    """Return 1 for one closed thought, one answer of any content, and no extra text, else 0.

    SAM-R1's "reasoning format".
    """
    return 0.0 if answer.parsed.fault in _UNREASONED or answer.parsed.rest else 1.0


def unrepeated(answer: Answer, sample: Sample) -> float:
    """Return 0 if two or more sentences of the completion repeat an earlier one, else 1.

    VisionReasoner's non-repeat reward.
    """
    sentences = [s for s in (part.strip() for part in answer.text.split(".")) if s]
    return 0.0 if len(sentences) - len(set(sentences)) >= 2 else 1.0


def overlong(answer: Answer, sample: Sample, *, budget: int, margin: float | None) -> float:
    """Return 1 up to `budget - margin` tokens, falling to 0 at `budget`; 0 for a truncated completion.

    Source: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), plus 1.

    Args:
        answer: to be paid.
        sample: not used.
        budget: tokens that a completion may have.
        margin: tokens over which the reward falls; if None, a fifth of the budget, as in DAPO (4,096 of
            20,480).
    """
    if not answer.finished:
        return 0.0
    return min(1.0, max(0.0, (budget - answer.length) / (budget / 5 if margin is None else margin)))


def point_count(answer: Answer, sample: Sample, *, ideal: float, width: float) -> float:
    """Return `exp(-(Q - ideal)² / (2 width²))` for Q points; 0 without a mask prompt.

    Seg-R1's `length_reward` with ideal 8 and width 2, which its released code registers but does not use.
    """
    prompt = answer.parsed.prompt
    if prompt is None:
        return 0.0
    return math.exp(-((len(prompt.points) - ideal) ** 2) / (2 * width**2))
