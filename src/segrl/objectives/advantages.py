r"""Rewards of groups to advantages. A group whose rewards are all equal has advantage exactly zero.

Each takes the rewards of the whole update, of all ranks: \( r_{bg} \), groups in rows.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def _same(rewards: Float[Tensor, "B G"]) -> Bool[Tensor, "B 1"]:
    """Groups without spread."""
    if rewards.shape[1] < 2:
        raise ValueError(
            f"stage.group_size: at least 2 completions are needed to compare; got {rewards.shape[1]}"
        )
    return rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)


def group_relative(rewards: Float[Tensor, "B G"], floor: float) -> Float[Tensor, "B G"]:
    r"""\( A_{bg} = (r_{bg} - \bar r_b) / (\sigma_b + \epsilon) \), deviation with G-1 in the denominator.

    GRPO (arXiv 2402.03300, section 4.1.2), as TRL 0.14 computes it.

    Args:
        rewards: of the completions.
        floor: epsilon; TRL and Seg-R1 use 1e-4, which makes noise of that size an advantage of 0.5.

    Raises:
        ValueError: if G < 2: one completion has nothing to be relative to.
    """
    same = _same(rewards)
    return (group_centred(rewards) / (rewards.std(1, keepdim=True) + floor)).masked_fill(same, 0.0)


def group_centred(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    r"""\( A_{bg} = r_{bg} - \bar r_b \): no group counts more for being easier or harder (Dr.GRPO, arXiv 2503.20783, 3.2)."""
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(_same(rewards), 0.0)


def leave_one_out(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    r"""\( A_{bg} = r_{bg} - \frac{1}{G-1} \sum_{h \ne g} r_{bh} \), an unbiased baseline (RLOO, arXiv 2402.14740, eq. 8)."""
    group = rewards.shape[1]
    return group_centred(rewards) * group / max(group - 1, 1)


def batch_normalised(rewards: Float[Tensor, "B G"], floor: float) -> Float[Tensor, "B G"]:
    r"""\( A_{bg} = (r_{bg} - \bar r_b) / (\sigma_{batch} + \epsilon) \): the group's mean, the whole batch's deviation.

    REINFORCE++ with its group baseline (arXiv 2501.03262, section 3.2): one scale for all groups of the update.
    """
    centred = group_centred(rewards)
    return centred / (centred.std() + floor)
