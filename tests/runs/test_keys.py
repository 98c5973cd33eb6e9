"""Each key has a type and a range in one place; a value outside is refused in a line that names the key."""

import ast
import inspect
import random
import re
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

sys.path.append(str(Path(__file__).parent))
from bad_input import COMPOSED, composed, good_values, is_told, said_of, table, typed, values  # noqa: E402
from by_hand import BY_HAND  # noqa: E402

from segrl.runs.assembly import keys
from segrl.runs.command import refusal
from segrl.runs.configuration import check_keys
from segrl.runs.messages import Refused  # noqa: E402
from segrl.runs.schema.commands import COMMANDS, SCALARS  # noqa: E402
from segrl.runs.schema.kinds import fault, shown  # noqa: E402
from segrl.runs.schema.table import PARTIAL, PARTS, SHAPES  # noqa: E402
from segrl.runs.schema.walk import Walk  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CALLED_WITH = {
    "logprobs", "old", "advantages", "mask", "group_size", "tokens", "reference", "rewards", "closes",
    "policy", "answer", "sample", "optimizer", "total_steps", "truth", "folder", "tags",
}  # fmt: skip
"""What code gives to a part that the configuration leaves to be called."""


@pytest.mark.parametrize(
    ("place", "target"),
    [(place, target) for place, parts in PARTS.items() for target in parts if target.startswith("segrl.")],
)
def test_the_keys_of_a_part_are_the_arguments_of_its_constructor(place, target):
    model, later = PARTS[place][target], place in PARTIAL or place == "fn" or place == "potential"
    made = get_object(target)
    taken = keys(made) if place == "stage" else inspect.signature(made).parameters
    arguments = {
        name: one for name, one in taken.items()
        if not (later and name in CALLED_WITH) and one.kind is not inspect.Parameter.VAR_POSITIONAL
    }  # fmt: skip
    assert set(model.model_fields) == set(arguments)
    for name, one in arguments.items():
        assert model.model_fields[name].is_required() == (one.default is inspect.Parameter.empty), name


def test_the_keys_of_nodes_without_a_constructor_are_those_of_what_reads_them():
    from segrl.data.image_mask import FolderPair
    from segrl.data.referring import Exclusion
    from segrl.models.hf_vlm import Lora
    from segrl.rewards.mixture import Term
    from segrl.tracking.alarms import Rule

    for shape, read in (("lora", Lora), ("term", Term), ("rule", Rule), ("exclusion", Exclusion)):
        assert set(SHAPES[shape].model_fields) == set(read.__annotations__), shape
    assert set(SHAPES["folder"].model_fields) == set(FolderPair.model_fields)
    trainer = inspect.signature(get_object("lightning.Trainer")).parameters
    assert set(PARTS["trainer"]["lightning.Trainer"].model_fields) <= set(trainer)


def test_alarms_may_watch_all_that_is_logged_and_nothing_else():
    told = re.search(r"Logged scalars: (.*?)`val/", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    documented = {
        f"{room}/{name}" for room, names in re.findall(r"(\w+)/\{([^}]+)\}", told)
        for name in names.split(",") if "<" not in name
    } | {"sft/loss"}  # fmt: skip
    assert documented <= SCALARS
    assert {one for one in SCALARS - documented} == {
        "head/loss",
        "head/iou",
        "head/quality_loss",
        "tower/cell_loss",
        "tower/box_loss",
    }


def test_every_bound_of_a_range_is_accepted():
    for one in {one for name in COMPOSED for one in typed(name)}:
        for value in good_values(one.schema):
            assert fault(one.model, one.field, value) is None, (one, value)


def test_some_bad_values_are_refused_by_their_key():
    """The values are a sample of all, each alone in its configuration."""
    for name, one, value in random.Random(0).sample(list(values()), 60):
        line = said_of(name, {one.key: value}).get(one.key, "TAKEN")
        assert is_told(one.key, value, line), (name, one.key, value, line)


@pytest.mark.slow
def test_every_bad_value_of_every_key_is_refused_by_its_key():
    wrong, count = [], 0
    for key, value, line in table():
        count += 1
        if not is_told(key, value, line):
            wrong.append((key, value, line))
    assert not wrong, wrong
    assert count > 9000


def test_a_line_of_the_table_is_the_line_that_is_printed(cli, tmp_path):
    numbers = [
        (one, value) for name, one, value in values()
        if name == "train +experiment=demo" and not isinstance(value, dict)
        and fault(one.model, one.field, "text") is not None
    ]  # fmt: skip
    for one, value in random.Random(1).sample(numbers, 4):
        line = said_of("train +experiment=demo", {one.key: value})[one.key]
        code, _, err = cli("+experiment=demo", f"++{one.key}={shown(value)}")
        assert (code, err) == (2, f"segrl: {line}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "train +experiment=demo",
        "train +experiment=ppo_dense_refcocog",
        "train +experiment=grpo_cod10k",
        "evaluate +suite=dis",
    ],
)
def test_an_unknown_neighbour_of_any_key_is_refused(name):
    command = COMPOSED[name][0]
    walk = Walk(OmegaConf.to_container(composed(name), resolve=False), COMMANDS[command])
    list(walk)
    cfg = composed(name).copy()
    places = {f"{place}.zzz" for place in walk.reached if "[" not in place}
    for key in places:
        OmegaConf.update(cfg, key, 1, force_add=True)
    with pytest.raises(Refused) as refused:
        check_keys(cfg, command)
    assert places <= {one.key for one in refused.value.faults}


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    BY_HAND,
    ids=lambda one: " ".join(one) if isinstance(one, list) else one,
)
def test_a_command_line_that_is_refused_by_hand(command, arguments, words):
    (line,) = refusal(command, arguments, only_keys=True)
    assert "\n" not in line and not line.rstrip().endswith(":"), line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("evaluate", ["+experiment=demo"]),  # which sets stage, reward and callbacks itself
        ("evaluate", ["data.contrast=[0.1,0.2]", "data.test_length=8", "data.workers=0"]),
        ("evaluate", ["+suite=synthetic", "trainer=ddp", "trainer.devices=2", "data.workers=0"]),
        ("train", ["+experiment=nano_sft", "reference=none"]),  # nothing is set that nothing reads
    ],
)
def test_keys_that_the_command_reads_may_be_set(command, arguments):
    assert refusal(command, arguments, only_keys=True) is None


def test_the_table_by_hand_has_eighty_command_lines():
    assert len(BY_HAND) >= 80


def test_nothing_heavy_is_imported_to_refuse():
    """The first modules that a command imports do not import `torch` or other heavy packages at
    their head.
    """
    for file in (
        "host/foreign.py",
        *(f"runs/{name}.py" for name in ("command", "configuration", "messages", "help_text")),
        *(f"runs/schema/{p.name}" for p in (ROOT / "src/segrl/runs/schema").glob("*.py")),
    ):
        for node in ast.parse((ROOT / "src" / "segrl" / file).read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name.split(".")[0] for name in names} & {
                "torch",
                "transformers",
                "lightning",
                "mlflow",
                "numpy",
                "sam2",
                "hydra",
            }, file
