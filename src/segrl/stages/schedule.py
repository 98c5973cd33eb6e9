"""Learning rate schedules that a stage's YAML names."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    *,
    pct_start: float,
    cycle_momentum: bool = True,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> OneCycleLR:
    """Return torch's `OneCycleLR` with two differences; see there for the arguments.

    Every parameter group peaks at its own learning rate: torch's single `max_lr` would give the critic the
    policy's rate. And the warm-up lasts at least one update: torch divides by the number of warm-up updates
    minus one, and fails where `pct_start` of `total_steps` is exactly one update.
    """
    updates = max(total_steps, 3)  # one to warm up, one to anneal
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(
        optimizer,
        peaks,
        total_steps=updates,
        pct_start=max(pct_start, 2 / updates),
        cycle_momentum=cycle_momentum,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        anneal_strategy=anneal_strategy,  # type: ignore[arg-type]
    )
