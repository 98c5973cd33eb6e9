"""Alarms: what goes wrong in reinforcement learning is seen while it goes wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import mean
from typing import Any

import lightning

from segrl.stages.base import Stage


class Alarms(lightning.Callback):
    """Warns, or stops the run after saving, when the mean of a scalar over the last updates is out of bounds.

    Args:
        window: updates that a mean is taken over.
        above: scalar to the bound that its mean may not pass.
        below: scalar to the bound that its mean may not fall under.
        collapse: scalar to the share of its best mean under which it may not fall; 0.5 is half of what it once was.
        explosion: scalar to the multiple of its first mean that it may not pass.
        stop: scalars whose alarm stops the run; the others warn, once.
    """

    def __init__(
        self,
        window: int,
        above: Mapping[str, float],
        below: Mapping[str, float],
        collapse: Mapping[str, float],
        explosion: Mapping[str, float],
        stop: list[str],
    ) -> None:
        self.window, self.stop = window, set(stop)
        self.above, self.below = dict(above), dict(below)
        self.collapse, self.explosion = dict(collapse), dict(explosion)
        self.recent: dict[str, deque[float]] = {}
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run raises the same alarms."""
        recent = {name: list(values) for name, values in self.recent.items()}
        return {"recent": recent, "first": self.first, "best": self.best, "warned": sorted(self.warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.recent = {name: deque(v, maxlen=self.window) for name, v in state_dict["recent"].items()}
        self.first, self.best = dict(state_dict["first"]), dict(state_dict["best"])
        self.warned = set(state_dict["warned"])

    def reasons(self, scalars: Mapping[str, float]) -> dict[str, str]:
        """Take in one update's scalars; what is out of bounds, and why."""
        found: dict[str, str] = {}
        for name in {*self.above, *self.below, *self.collapse, *self.explosion} & set(scalars):
            recent = self.recent.setdefault(name, deque(maxlen=self.window))
            recent.append(scalars[name])
            if len(recent) < self.window:
                continue
            now = mean(recent)
            first = self.first.setdefault(name, now)
            best = self.best[name] = max(self.best.get(name, now), now)
            if now > self.above.get(name, float("inf")):
                found[name] = f"{now:.3g} is above {self.above[name]:.3g}"
            elif now < self.below.get(name, float("-inf")):
                found[name] = f"{now:.3g} is below {self.below[name]:.3g}"
            elif name in self.collapse and best > 0 and now < self.collapse[name] * best:
                found[name] = f"{now:.3g} has fallen from {best:.3g}"
            elif name in self.explosion and first > 0 and now > self.explosion[name] * first:
                found[name] = f"{now:.3g} has risen from {first:.3g}"
        return found

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Every rank sees the same scalars, so all stop together."""
        if not isinstance(pl_module, Stage):
            return
        for name, reason in self.reasons(pl_module.latest).items():
            stops = name in self.stop
            if trainer.is_global_zero and (stops or name not in self.warned):
                verdict = "stopping, saved" if stops else "going on"
                print(
                    f"  alarm at update {trainer.global_step}: {name}, mean of {self.window} updates, {reason}; {verdict}",
                    flush=True,
                )
            self.warned.add(name)
            trainer.should_stop = trainer.should_stop or stops
