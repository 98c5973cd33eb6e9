"""Every experiment with every option of every group composes and binds, or is refused in one line.

The line says which two do not go together, and what to write.
"""

import random
import re

import pytest

from segrl.runs.command import refusal
from segrl.runs.configuration import conf_folder, experiments

GROUPS = (
    "stage",
    "policy",
    "reference",
    "head",
    "grammar",
    "reward",
    "rollout",
    "data",
    "trainer",
    "logger",
    "callbacks",
    "+adapter",
)
NEEDED = {
    "data=image_mask": ["data.root=x"],
    "data=jsonl": ["data.train=x", "data.test=x"],
    "data=traces": ["data.root=x", "data.traces=x"],
}
WRITTEN = {"trainer.max_steps": 1200, "stage.kl_weight": 0}  # 1200: a multiple of all updates
ALL = [
    (experiment, f"{group}={path.stem}")
    for experiment in experiments()
    for group in GROUPS
    for path in sorted((conf_folder() / group.lstrip("+")).glob("[!_]*.yaml"))
]


def held(experiment, choice):
    """None where the two go together, or the line; what a line says to add is tried."""
    arguments = [f"+experiment={experiment}", choice, *NEEDED.get(choice, [])]
    lines = refusal("train", arguments, only_keys=True)
    if lines is None:
        return None
    (line,) = lines
    assert "\n" not in line and choice in line, (arguments, line)
    way = re.findall(r"'(~[\w.]+)'", line)
    if "to the command line" in line:
        assert f"experiment={experiment}" in line, line
        for _ in range(4):  # one refusal may hide the next
            keys = re.findall(r"add ([\w.]+)=\.\.\. to the command line", line)
            if not way and not keys:
                assert "must" in line, line
                break
            arguments += [*way, *(f"{key}={WRITTEN.get(key, 'null')}" for key in keys)]
            again = refusal("train", arguments, only_keys=True)
            if again is None:
                return line
            assert again[0] != line, (arguments, again)
            line, way = again[0], re.findall(r"'(~[\w.]+)'", again[0])
    return line


@pytest.mark.parametrize(("experiment", "choice"), random.Random(0).sample(ALL, 25), ids="-".join)
def test_some_experiments_with_some_options(experiment, choice):
    held(experiment, choice)


@pytest.mark.slow
def test_all_experiments_with_all_options():
    refused = {(one, choice): line for one, choice in ALL if (line := held(one, choice)) is not None}
    assert 0 < len(refused) < len(ALL) / 2


def test_an_experiments_diff_that_meets_another_group_names_both_and_the_way_out():
    (line,) = refusal("train", ["+experiment=demo", "reward=iou_only"])
    assert "experiment=demo" in line and "reward=iou_only" in line and "'~reward.terms.format'" in line
    assert refusal("train", ["+experiment=demo", "reward=iou_only", "~reward.terms.format"]) is None
