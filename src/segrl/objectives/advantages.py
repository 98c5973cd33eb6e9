"""Rewards of a group to advantages."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def group_relative(rewards: Float[Tensor, "B G"], floor: float) -> Float[Tensor, "B G"]:
    r"""\( A_{bg} = (r_{bg} - \bar r_b) / (\sigma_b + \epsilon) \), deviation with G-1 in the denominator.

    GRPO (arXiv 2402.03300, section 4.1.2), as TRL 0.14 computes it. A group whose rewards are all equal has
    advantage exactly zero.

    Args:
        rewards: of the completions, groups in rows.
        floor: epsilon; TRL and Seg-R1 use 1e-4, which makes noise of that size an advantage of 0.5.

    Raises:
        ValueError: if G < 2: one completion has nothing to be relative to.
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"stage.group_size: at least 2 completions are needed to compare; got {rewards.shape[1]}"
        )
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True)
    same = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return (centred / (spread + floor)).masked_fill(same, 0.0)
