"""Degenerate completions earn less than clean ones, under every shipped reward and score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segrl.geometry import inner_point, tight_box
from segrl.prompts.frames import permille
from segrl.protocols import Grammar
from segrl.rewards.geometry import two_points
from segrl.runs.configuration import conf_folder, register_resolvers
from segrl.types import Answer, MaskPrompt, Parsed, Sample

SIDE, FRAME, LONG = 100, permille(1, 1), 100
LOOP = "It is a man. " * 5


def block(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:bottom, left:right] = True
    return mask


TRUTH, WORSE, WHOLE = block(20, 20, 50, 60), block(20, 26, 50, 66), block(0, 0, SIDE, SIDE)
SAMPLE = Sample(id="s", image=np.zeros((SIDE, SIDE, 3), np.uint8), mask=TRUTH, objects=TRUTH[None])


def drawn(prompt: MaskPrompt | None) -> np.ndarray:
    """Draw the boxes; if there are none, a block of the truth's size around the first point."""
    mask = np.zeros((SIDE, SIDE), bool)
    if prompt is None:
        return mask
    for x1, y1, x2, y2 in (prompt.boxes * SIDE).round().astype(int):
        mask[y1:y2, x1:x2] = True
    if not len(prompt.boxes) and len(prompt.points):
        x, y = (prompt.points[0] * SIDE).round().astype(int)
        mask[max(y - 15, 0) : y + 15, max(x - 20, 0) : x + 20] = True
    return mask


@dataclass(frozen=True)
class Pair:
    """A grammar and what its answers hold."""

    grammar: Grammar
    name: str

    def says(self, mask: np.ndarray, thought: str = "a fish") -> str:
        """Return the completion of an annotator who sees this mask."""
        boxes = [tight_box(mask)] if "boxes" in self.grammar.says else []
        points = [tight_box(mask).reshape(2, 2).mean(0)]
        if self.name == "seg_zero_json":
            points = list(two_points(mask))
        if self.name == "vision_reasoner_json":
            points = [inner_point(mask)]
        return self.grammar.render(
            Parsed(thought=thought, prompt=MaskPrompt.of(boxes, points, [1] * len(points))), FRAME
        )

    def completions(self) -> dict[str, tuple[str, bool]]:
        """Return by kind the text and whether it ended by itself."""
        good = self.says(TRUTH)
        answer = good[good.find("</think>") + len("</think>") :] if "</think>" in good else good
        thought = good[: len(good) - len(answer)]
        bad = thought + answer.replace("[", "(")
        kinds = {
            "good": (good, True),
            "worse": (self.says(WORSE), True),
            "bad": (bad, True),
            "whole image": (self.says(WHOLE), True),
            "ramble before": (f"well, let me see {good}", True),
            "ramble behind": (f"{good} and so on and so on", True),
            "bad, ramble behind": (f"{bad} and so on and so on", True),
            "looped thought": (self.says(TRUTH, LOOP), True),
            "looped behind": (good + LOOP, True),
            "looped, cut off": (f"<think> {LOOP}", False),
            "two thoughts": (thought + good, True),
            "two answers": (good + answer, True),
            "cut off": (good[: len(good) - len(answer) // 2], False),
            "empty": ("", True),
        }
        return kinds if thought else {kind: said for kind, said in kinds.items() if "thought" not in kind}

    def answers(self) -> dict[str, Answer]:
        """Return by kind the answers that the segmenter hands to a reward."""
        read = {
            kind: (self.grammar.parse(text, FRAME), text, ended)
            for kind, (text, ended) in self.completions().items()
        }
        return {
            kind: Answer(
                text=text,
                parsed=parsed,
                mask=drawn(parsed.prompt),
                length=30 if ended else LONG,
                finished=ended,
            )
            for kind, (parsed, text, ended) in read.items()
        }


JSON = ("sam_r1_json", "seg_zero_json", "vision_reasoner_json")
GRAMMARS = {
    "pre_rl": ("seg_r1_points",),
    "sam_r1": ("sam_r1_json", "seg_r1_tags"),
    "sam_r1_scaled": ("sam_r1_json", "seg_r1_tags"),
    "seg_r1_published": ("seg_r1_released", "seg_r1_tags"),
    "seg_zero": ("seg_zero_json",),
    "vision_reasoner": ("vision_reasoner_json",),
}
REWARDS = sorted(path.stem for path in (conf_folder() / "reward").glob("*.yaml"))
CASES = [(reward, grammar) for reward in REWARDS for grammar in GRAMMARS.get(reward, ("seg_r1_tags", *JSON))]


@cache
def composed(group: str, name: str, config: str = "train") -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config, [f"{group}={name}", f"rollout.max_tokens={LONG}"])


@cache
def pair(name: str) -> Pair:
    node = OmegaConf.load(conf_folder() / "grammar" / f"{name}.yaml")
    node.instructions = None
    return Pair(instantiate(node), name)


@cache
def answers_in(name: str) -> dict[str, Answer]:
    return pair(name).answers()


def paid(reward: str, grammar: str) -> dict[str, float]:
    """Return by kind the whole reward."""
    node = composed("reward", reward).reward
    return {
        kind: instantiate(node)([answer], [SAMPLE]).total.item()
        for kind, answer in answers_in(grammar).items()
    }


@pytest.mark.parametrize(("reward", "grammar"), CASES)
def test_no_degenerate_completion_earns_what_a_clean_one_earns(reward: str, grammar: str) -> None:
    total = paid(reward, grammar)
    terms = set(composed("reward", reward).reward.terms)
    shown = {kind: round(value, 3) for kind, value in total.items()}
    assert total["good"] == max(total.values()), shown
    assert (total["good"] > total["worse"]) == (reward != "binary"), shown  # whose threshold both pass
    assert total["worse"] > total["bad"], shown
    assert total["worse"] > total["whole image"], shown
    # What cannot be parsed earns no more than the shortest thing that cannot, and never as much as a clean
    # worse answer.
    for kind in ("bad, ramble behind", "looped, cut off", "cut off"):
        assert total[kind] <= total["bad"], (kind, shown)
    assert total["empty"] <= total["bad"], shown
    # A good answer with other text around it earns more than a bad answer, and never more than a clean one.
    for kind in total.keys() & {"ramble before", "ramble behind", "looped thought", "looped behind"}:
        assert total["bad"] < total[kind] <= total["good"], (kind, shown)
    pays_form = bool({"format", "reasoning"} & terms) and reward != "seg_r1_published"
    assert (total["ramble behind"] < total["good"]) == pays_form, shown
    assert (total["ramble before"] < total["good"]) == (pays_form and grammar in JSON), shown
    if "reasoning" in terms:
        for kind in (
            "bad, ramble behind",
            "two thoughts",
            "two answers",
            "cut off",
            "looped, cut off",
            "empty",
        ):
            assert total[kind] < total["bad"], (kind, shown)
    if "unrepeated" in terms:
        assert total["looped thought"] < total["good"], shown
        assert total["looped behind"] < total["ramble behind"], shown
        assert total["looped, cut off"] < total["empty"], shown
    if "overlong" in terms:
        assert total["cut off"] < total["empty"], shown
    if grammar != "seg_r1_released":  # which takes the first, as released
        assert all(total[kind] <= total["bad"] for kind in total.keys() & {"two thoughts", "two answers"}), (
            shown
        )


LOWER = {"mae", "hce"}
ODD = {"adp_e", "adp_f"}  # pysodmetrics': an empty map counts as full; docs/evaluation.md says so


@pytest.mark.parametrize("family", sorted(path.stem for path in (conf_folder() / "scores").glob("*.yaml")))
@pytest.mark.parametrize("grammar", ["seg_r1_tags", "seg_r1_points", *JSON])
def test_no_score_puts_what_cannot_be_parsed_above_a_clean_worse_answer(family: str, grammar: str) -> None:
    scores, answers = instantiate(composed("scores", family, "evaluate").scores), answers_in(grammar)

    def values(kind: str) -> dict[str, float]:
        answer = answers[kind]
        parts = scores.parts(answer.mask.astype(np.uint8) * 255, TRUTH, None, answer.parsed.fault is not None)
        found = scores.summary({name: np.asarray(part) for name, part in parts.items()})
        kept = {name: float(value) for name, value in found.items() if name not in ODD and np.isfinite(value)}
        return {name: -value if name in LOWER else value for name, value in kept.items()}

    good, worse = values("good"), values("worse")
    assert {"sm", "mae"} <= set(good) or {"giou", "ciou"} <= set(good)
    for kind in answers.keys() & {
        "bad",
        "bad, ramble behind",
        "looped, cut off",
        "cut off",
        "two thoughts",
        "empty",
    }:
        assert answers[kind].parsed.fault is not None, kind
        for name, value in values(kind).items():
            assert value <= worse[name] + 1e-12, (kind, name, value, worse[name])
    for name, value in worse.items():
        assert value <= good[name] + 1e-12, (name, value, good[name])
    for kind in answers.keys() & {
        "ramble behind",
        "looped thought",
        "looped behind",
    }:  # a score looks at the mask
        assert values(kind) == good


def test_the_table_holds_every_shipped_reward() -> None:
    assert {reward for reward, _ in CASES} == set(REWARDS) and set(GRAMMARS) <= set(REWARDS)
