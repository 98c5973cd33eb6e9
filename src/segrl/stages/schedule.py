"""Learning-rate schedules, as a stage's YAML names them."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(
    optimizer: Optimizer, total_steps: int, *, pct_start: float, cycle_momentum: bool = True,
    anneal_strategy: str = "cos", div_factor: float = 25.0, final_div_factor: float = 1e4,
) -> OneCycleLR:  # fmt: skip
    """Return `torch`'s OneCycleLR for runs of any length, in which every group of weights peaks at its own rate.

    torch takes one `max_lr` for all groups unless it is given a list, and so would put a critic on the policy's rate. torch divides by the number of updates that warm up less one, and so fails where `pct_start` of `total_steps` is
    exactly one update. Here at least the first update warms up. See there for the arguments.
    """
    updates = max(total_steps, 3)  # one to warm up, one to come down
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(
        optimizer, peaks, total_steps=updates, pct_start=max(pct_start, 2 / updates), cycle_momentum=cycle_momentum,
        div_factor=div_factor, final_div_factor=final_div_factor, anneal_strategy=anneal_strategy,  # type: ignore[arg-type]
    )  # fmt: skip
