"""A strategy that satisfies the protocol `Sharding` is asked what sharding changes, whatever its class."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from segrl.protocols import Sharding
from segrl.stages.base import Optimization, Stage
from segrl.stages.unsharded import UNSHARDED
from segrl.stages.zero import ZeRO


class Shards:
    """The fewest members that make a strategy a `Sharding`."""

    early_graphs = split_groups = partial_updates = False

    def __init__(self):
        self.asked = []

    def whole_weights(self, *modules):
        self.asked.append(modules)
        return nullcontext()

    def clip(self, parameters, max_norm):
        self.asked.append(max_norm)
        return torch.tensor(7.0)


class Small(Stage):
    """A stage with one weight."""

    def __init__(self, strategy):
        optimization = Optimization(optimizer=torch.optim.SGD, schedule=None, max_grad_norm=2.0)
        super().__init__(optimization=optimization, seed=0)
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self._trainer = SimpleNamespace(strategy=strategy)


def test_a_strategy_that_satisfies_the_protocol_is_asked():
    stage = Small(shards := Shards())
    with stage.whole_weights(stage.layer, None, "no module"):
        pass
    assert stage.clip(stage.parameters()) == 7.0 and stage.sharding is shards
    assert shards.asked == [(stage.layer,), 2.0]


def test_any_other_strategy_does_what_torch_does():
    stage = Small(strategy=object())
    stage.layer.weight.grad = torch.full((1, 1), 8.0)
    assert stage.sharding is UNSHARDED and stage.clip(stage.parameters()) == 8.0
    torch.testing.assert_close(stage.layer.weight.grad, torch.full((1, 1), 2.0))
    assert UNSHARDED.early_graphs and UNSHARDED.split_groups and UNSHARDED.partial_updates


def test_zero_satisfies_the_protocol():
    three = ZeRO.__new__(ZeRO)
    three.split_groups = False
    assert isinstance(three, Sharding) and not (three.early_graphs or three.partial_updates)
