"""Alarms: rules about logged scalars that warn, or stop the run, while it trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import mean
from typing import Any, NotRequired, TypedDict

import lightning

from segrl.stages.base import Stage


class Rule(TypedDict):
    """Bounds of a scalar's mean over the last updates; each bound is optional."""

    scalar: str
    stop: bool
    """If true, the run stops after saving; if false, one warning is printed."""
    above: NotRequired[float]
    below: NotRequired[float]
    collapse: NotRequired[float]
    """The mean must not fall below this share of its largest value so far."""
    explosion: NotRequired[float]
    """The mean must not exceed this multiple of its first value."""


class Alarms(lightning.Callback):
    """Callback that warns if a scalar is out of bounds, or stops the run after saving.

    Args:
        window: number of updates that a mean is taken over.
        rules: rules by name.
    """

    def __init__(self, window: int, rules: Mapping[str, Rule]) -> None:
        self.window, self.rules = window, dict(rules)
        self.recent: dict[str, deque[float]] = {}
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, so that a resumed run raises the same alarms."""
        recent = {name: list(values) for name, values in self.recent.items()}
        return {"recent": recent, "first": self.first, "best": self.best, "warned": sorted(self.warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.recent = {name: deque(v, maxlen=self.window) for name, v in state_dict["recent"].items()}
        self.first, self.best = dict(state_dict["first"]), dict(state_dict["best"])
        self.warned = set(state_dict["warned"])

    def reasons(self, scalars: Mapping[str, float]) -> dict[str, str]:
        """Add one update's scalars, and return the broken rules with their reasons."""
        means: dict[str, float] = {}
        for scalar in {rule["scalar"] for rule in self.rules.values()} & set(scalars):
            recent = self.recent.setdefault(scalar, deque(maxlen=self.window))
            recent.append(scalars[scalar])
            if len(recent) == self.window:
                means[scalar] = now = mean(recent)
                self.first.setdefault(scalar, now)
                self.best[scalar] = max(self.best.get(scalar, now), now)
        broken = {name: self._broken(rule, means) for name, rule in self.rules.items()}
        return {name: reason for name, reason in broken.items() if reason}

    def _broken(self, rule: Rule, means: Mapping[str, float]) -> str:
        """Return how a rule is broken, or an empty string."""
        if rule["scalar"] not in means:
            return ""
        now, first, best = (known[rule["scalar"]] for known in (means, self.first, self.best))
        if "above" in rule and now > rule["above"]:
            return f"{now:.3g} is above {rule['above']:.3g}"
        if "below" in rule and now < rule["below"]:
            return f"{now:.3g} is below {rule['below']:.3g}"
        if "collapse" in rule and best > 0 and now < rule["collapse"] * best:
            return f"{now:.3g} is below {rule['collapse']:.3g} of its largest value, {best:.3g}"
        if "explosion" in rule and first > 0 and now > rule["explosion"] * first:
            return f"{now:.3g} is above {rule['explosion']:.3g} times its first value, {first:.3g}"
        return ""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Check the rules. All ranks see the same scalars, so all stop at the same update."""
        if not isinstance(pl_module, Stage):
            return
        for name, reason in self.reasons(pl_module.latest).items():
            stops = self.rules[name]["stop"]
            if trainer.is_global_zero and (stops or name not in self.warned):
                what = f"{name} ({self.rules[name]['scalar']}, mean of {self.window} updates)"
                verdict = "the run is saved and stops" if stops else "the run continues"
                print(f"  alarm at update {trainer.global_step}: {what}: {reason}; {verdict}", flush=True)
            self.warned.add(name)
            trainer.should_stop = trainer.should_stop or stops
