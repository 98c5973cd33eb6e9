"""Turn the rewards of groups into advantages.

Each function takes `r[b, g]`, the rewards of the whole update of all ranks, one group per row. A group whose
rewards are all equal gets advantages of exactly zero. All functions raise ValueError if G < 2.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def _same(rewards: Float[Tensor, "B G"]) -> Bool[Tensor, "B 1"]:
    """Return which groups have equal rewards, bool `[B, 1]`. Raise ValueError if G < 2."""
    if rewards.shape[1] < 2:
        raise ValueError(
            f"stage.group_size: must be at least 2, to compare completions; got {rewards.shape[1]}"
        )
    return rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)


def group_relative(rewards: Float[Tensor, "B G"], floor: float) -> Float[Tensor, "B G"]:
    """Return `A[b,g] = (r[b,g] - mean_b) / (std_b + ε)`; the deviation has G-1 in its denominator.

    GRPO (arXiv 2402.03300, section 4.1.2), as TRL 0.14 computes it. Groups of equal rewards get exactly 0.

    Args:
        rewards: one per completion.
        floor: ε. TRL and Seg-R1 use 1e-4, which halves the advantages of a group with a deviation of 1e-4.

    Raises:
        ValueError: if G < 2.
    """
    same = _same(rewards)
    return (group_centred(rewards) / (rewards.std(1, keepdim=True) + floor)).masked_fill(same, 0.0)


def group_centred(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Return `A[b,g] = r[b,g] - mean_b` (Dr.GRPO, arXiv 2503.20783, section 3.2).

    There is no division by the deviation, so a group does not weigh more because its rewards spread less.

    Raises:
        ValueError: if G < 2.
    """
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(_same(rewards), 0.0)


def leave_one_out(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Return `A[b,g] = r[b,g] - Σ_{h≠g} r[b,h] / (G-1)` (RLOO, arXiv 2402.14740, eq. 8).

    Raises:
        ValueError: if G < 2.
    """
    group = rewards.shape[1]
    return group_centred(rewards) * group / (group - 1)


def batch_normalised(rewards: Float[Tensor, "B G"], floor: float) -> Float[Tensor, "B G"]:
    """Return `A[b,g] = (r[b,g] - mean_b) / (std + ε)`; all groups of the update share one `std`.

    `std` is the deviation of all `r[b,g] - mean_b`. REINFORCE++ with its group baseline (arXiv 2501.03262,
    section 3.2).

    Args:
        rewards: one per completion.
        floor: ε.

    Raises:
        ValueError: if G < 2.
    """
    centred = group_centred(rewards)
    return centred / (centred.std() + floor)
