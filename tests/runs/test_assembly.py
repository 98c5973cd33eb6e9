"""A stage is built from flat keys: arguments of its constructor, and fields of its dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from segrl.runs.assembly import keys, stage_of
from segrl.stages.grpo import GRPOStage
from segrl.stages.ppo import PPOStage


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A composite."""

    few: int
    many: int = 9


class Made:
    """A stage of a user."""

    def __init__(self, *, name: str, sizes: Sizes, seed: int = 0) -> None:
        self.name, self.sizes, self.seed = name, sizes, seed


OWN = f"{__name__}.Made"


def node(**values):
    return OmegaConf.create({"stage": {"_target_": OWN, **values}, "few": 3}).stage


def test_keys_are_arguments_and_fields():
    made = stage_of(node(name="a", few="${few}", seed=4))
    assert (made.name, made.sizes, made.seed) == ("a", Sizes(few=3, many=9), 4)
    assert stage_of(node(name="a", few=1, many=2)).sizes == Sizes(few=1, many=2)
    assert list(keys(Made)) == ["name", "few", "many", "seed"]


def test_a_part_of_a_key_is_built_and_a_list_of_parts_too():
    number = {"_target_": "builtins.int", "_args_": ["7"]}
    made = stage_of(node(name=[number, number], few=number))
    assert list(made.name) == [7, 7] and made.sizes.few == 7


@pytest.mark.parametrize("values", [{"name": "a"}, {"name": "a", "few": 1, "fewer": 2}, {"few": 1}])
def test_a_key_that_is_missing_or_unknown_is_a_line(values):
    with pytest.raises(ValueError, match=rf"stage: must be a node of keys that {OWN} takes \(.*few|name"):
        stage_of(node(**values))


@pytest.mark.parametrize("stage", [GRPOStage, PPOStage])
def test_the_keys_that_users_type_are_there(stage):
    short = {"group_size", "micro_batch_size", "kl_weight", "surrogate", "optimizer", "schedule", "policy"}
    assert short <= set(keys(stage))
