from __future__ import annotations

import numpy as np
import pytest
import torch

from segrl.rewards.mixture import RewardMixture
from segrl.rewards.text import parses, point_count, well_formed
from segrl.types import Answer, MaskPrompt, Parsed, ParseFault, Sample

MASK = np.zeros((2, 2), bool)


def length(answer: Answer, sample: Sample) -> float:
    return float(len(answer.text))


def area(answer: Answer, sample: Sample) -> float:
    return float(answer.mask.sum())


def whose(answer: Answer, sample: Sample) -> float:
    return float(sample.id)


def read(parsed: Parsed, text: str = "", mask: np.ndarray = MASK) -> Answer:
    return Answer(text=text, parsed=parsed, mask=mask, length=1, finished=True)


def said(texts: list[str], masks: list[np.ndarray]) -> list[Answer]:
    return [read(Parsed(), text, mask) for text, mask in zip(texts, masks, strict=True)]


def samples(count: int) -> list[Sample]:
    return [Sample(id=str(b), image=np.zeros((2, 2, 3), np.uint8), mask=MASK) for b in range(count)]


def points(count: int) -> Parsed:
    return Parsed(prompt=MaskPrompt.of((), [[0.5, 0.5]] * count, [1] * count))


def test_the_total_is_the_weighted_sum_and_the_breakdown_is_kept_unweighted() -> None:
    mixture = RewardMixture({"length": {"fn": length, "weight": 0.5}, "area": {"fn": area, "weight": 2.0}})
    masks = [np.array([[True, False], [False, False]]), np.array([[True, True], [True, False]])]
    scores = mixture(said(["ab", "abcd"], masks), samples(1))
    assert scores.total.tolist() == [[0.5 * 2 + 2 * 1, 0.5 * 4 + 2 * 3]]
    assert {name: term.tolist() for name, term in scores.terms.items()} == {
        "length": [[2.0, 4.0]],
        "area": [[1.0, 3.0]],
    }
    assert list(scores.terms) == ["length", "area"]
    assert scores.total.dtype == torch.float32


def test_groups_are_contiguous_and_each_completion_meets_its_own_sample() -> None:
    mixture = RewardMixture({"whose": {"fn": whose, "weight": 1.0}, "length": {"fn": length, "weight": 10.0}})
    texts = ["", "a", "aa", "aaa", "aaaa", "aaaaa"]
    scores = mixture(said(texts, [MASK] * 6), samples(3))
    assert scores.terms["whose"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert scores.terms["length"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert scores.total.tolist() == [[0, 10], [21, 31], [42, 52]]


def test_a_term_is_asked_once_per_completion() -> None:
    asked = []

    def counting(answer: Answer, sample: Sample) -> float:
        asked.append((answer.text, sample.id))
        return 1.0

    RewardMixture({"counting": {"fn": counting, "weight": 1.0}})(said(list("abcd"), [MASK] * 4), samples(2))
    assert asked == [("a", "0"), ("b", "0"), ("c", "1"), ("d", "1")]


@pytest.mark.parametrize("weight", [0, 0.0, -0.3, float("nan")])
def test_a_weight_that_is_not_positive_is_refused_by_its_key(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"reward\.terms\.area\.weight.*positive.*got {weight}"):
        RewardMixture({"length": {"fn": length, "weight": 1.0}, "area": {"fn": area, "weight": weight}})


def test_no_terms_are_refused_by_their_key() -> None:
    with pytest.raises(ValueError, match=r"reward\.terms.*at least one"):
        RewardMixture({})


def test_groups_are_whole() -> None:
    mixture = RewardMixture({"area": {"fn": area, "weight": 1.0}})
    with pytest.raises(AssertionError, match="whole"):
        mixture(said(["a"] * 3, [MASK] * 3), samples(2))


def test_a_whole_number_from_the_config_is_a_weight() -> None:
    scores = RewardMixture({"area": {"fn": area, "weight": 3}})(said(["a"], [~MASK]), samples(1))
    assert scores.total.item() == 12.0


def test_the_format_term_pays_sentences_and_no_fault() -> None:
    sample = samples(1)[0]
    assert well_formed(read(points(1)), sample) == 1.0
    assert [well_formed(read(Parsed(fault=fault)), sample) for fault in ParseFault] == [0.0] * len(ParseFault)


def test_rambling_on_behind_the_answer_costs_the_format_but_not_as_published() -> None:
    sample, rambling = samples(1)[0], Parsed(prompt=MaskPrompt.of([], [[0.5, 0.5]], [1]), rest="and so on")
    assert (well_formed(read(rambling), sample), parses(read(rambling), sample)) == (0.0, 1.0)
    assert parses(read(Parsed(fault=ParseFault.NO_BOX)), sample) == 0.0


def test_the_point_count_term_is_a_bell_around_its_ideal() -> None:
    sample = samples(1)[0]
    paid = [point_count(read(points(n)), sample, ideal=8, width=2) for n in (4, 6, 8, 10, 12)]
    assert paid == pytest.approx([np.exp(-2), np.exp(-0.5), 1.0, np.exp(-0.5), np.exp(-2)])
    assert point_count(read(Parsed(fault=ParseFault.NO_POINTS)), sample, ideal=0, width=2) == 0.0


def test_no_term_sees_what_a_mask_covers_of_an_ignored_region() -> None:
    ignore = np.array([[True, False], [False, False]])
    sample = Sample(id="1", image=np.zeros((2, 2, 3), np.uint8), mask=~ignore, ignore=ignore)
    scores = RewardMixture({"area": {"fn": area, "weight": 1.0}})(
        said(["", ""], [np.ones((2, 2), bool), ignore]), [sample]
    )
    assert scores.total.tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("paid", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_finite_number_is_refused_by_name(paid):
    def broken(answer: Answer, sample: Sample) -> float:
        return paid if answer.text == "b" else 0.0

    mixture = RewardMixture(
        {"length": {"fn": length, "weight": 1.0}, "broken": {"fn": broken, "weight": 1.0}}
    )
    with pytest.raises(
        ValueError,
        match=r"reward\.terms\.broken: must return a finite number; got .*(nan|inf).* an answer to 1$",
    ):
        mixture(said(["a", "a", "a", "b"], [MASK] * 4), samples(2))
