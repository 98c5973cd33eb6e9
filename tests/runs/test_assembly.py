"""A stage is built from flat keys: arguments of its constructor, and fields of its dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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


class PassesOn(Made):
    """A stage that adds a key and passes the others on."""

    def __init__(self, extra: int, **rest) -> None:
        super().__init__(**rest)
        self.extra = extra


if TYPE_CHECKING:
    from nowhere import Unknown


class HalfKnown:
    """A stage with an annotation that only a type checker sees."""

    def __init__(self, name: Unknown, sizes: Sizes | None) -> None:
        self.name, self.sizes = name, sizes


def test_a_stage_that_passes_keys_on_takes_those_of_its_base():
    assert list(keys(PassesOn)) == ["extra", "name", "few", "many", "seed"]
    own = OmegaConf.create({"_target_": f"{__name__}.PassesOn", "extra": 5, "name": "a", "few": 1, "seed": 2})
    made = stage_of(own)
    assert (made.extra, made.name, made.sizes, made.seed) == (5, "a", Sizes(few=1), 2)


def test_an_annotation_that_cannot_be_evaluated_hides_none_of_the_others():
    assert list(keys(HalfKnown)) == ["name", "few", "many"]
    made = stage_of(OmegaConf.create({"_target_": f"{__name__}.HalfKnown", "name": 1, "few": 2}))
    assert made.sizes == Sizes(few=2)


def test_an_error_inside_a_constructor_is_not_taken_for_a_wrong_key(monkeypatch):
    monkeypatch.setattr(Made, "__init__", lambda self, name: name["a"])
    with pytest.raises(TypeError, match="indices"):
        stage_of(OmegaConf.create({"_target_": OWN, "name": "text"}))


@pytest.mark.parametrize("stage", [GRPOStage, PPOStage])
def test_the_keys_that_users_type_are_there(stage):
    short = {"group_size", "micro_batch_size", "kl_weight", "surrogate", "optimizer", "schedule", "policy"}
    assert short <= set(keys(stage))
