"""Rewards of SAM-R1, Seg-Zero, VisionReasoner and DAPO; a policy that ignores the image earns little."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from segrl.geometry import inner_point, tight_box
from segrl.rewards import geometry
from segrl.rewards.mask import Quantile, binary, iou, tiered, tiered_potential
from segrl.rewards.mixture import RewardMixture
from segrl.rewards.text import objects_formed, overlong, parses, reasoned, unrepeated, well_formed
from segrl.runs.configuration import conf_folder
from segrl.types import Answer, MaskPrompt, Parsed, ParseFault, Sample

SIDE = 100
TIERS = {0.8: 4.0, 0.7: 3.0, 0.5: 2.0}


def block(top, left, bottom, right):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:bottom, left:right] = True
    return mask


def sample(*objects):
    mask = np.logical_or.reduce(objects) if objects else np.zeros((SIDE, SIDE), bool)
    return Sample(
        id="s",
        image=np.zeros((SIDE, SIDE, 3), np.uint8),
        mask=mask,
        objects=np.array(objects).reshape(-1, SIDE, SIDE),
    )


def answer(mask=None, boxes=(), points=(), thought="", length=10, finished=True, **parsed):
    if "fault" not in parsed:
        parsed["prompt"] = MaskPrompt.of(boxes, points, [1] * len(points))
    mask = np.zeros((SIDE, SIDE), bool) if mask is None else mask
    return Answer(
        text="", parsed=Parsed(thought=thought, **parsed), mask=mask, length=length, finished=finished
    )


@pytest.mark.parametrize(
    ("columns", "paid"),
    [(50, 0.0), (51, 2.0), (70, 2.0), (71, 3.0), (80, 3.0), (81, 4.0), (100, 4.0), (0, 0.0)],
)
def test_an_iou_equal_to_a_bound_stays_in_the_tier_below(columns, paid):
    """A mask of so many of the truth's 100 columns has that IoU in percent."""
    given, truth = answer(block(0, 0, SIDE, columns)), sample(block(0, 0, SIDE, SIDE))
    assert tiered(given, truth, tiers=TIERS) == paid
    assert tiered_potential(given.mask, truth.mask, tiers=TIERS) == paid
    assert binary(given, truth, threshold=0.5) == float(columns > 50)


def test_no_object_and_none_found_is_the_highest_tier_and_a_fault_none():
    assert tiered(answer(), sample(), tiers=TIERS) == 4.0
    assert tiered(answer(fault=ParseFault.NO_BOX), sample(), tiers=TIERS) == 0.0


def test_a_quantile_is_the_share_of_earlier_answers_surpassed_and_goes_through_a_checkpoint():
    rank, truth = Quantile(iou, window=4), sample(block(0, 0, SIDE, SIDE))

    def ranked(quantile, *columns):
        scores = [quantile(answer(block(0, 0, SIDE, c)), truth) for c in columns]
        quantile.settle()
        return scores

    assert ranked(rank, 40, 60) == [0.4, 0.6]  # nothing to rank against yet
    assert ranked(rank, 20, 60, 100, 50) == [0.0, 0.75, 1.0, 0.5]
    assert rank.remembered() == [0.2, 0.6, 1.0, 0.5]
    other = Quantile(iou, window=4)
    other.remember(rank.remembered())
    assert ranked(other, 60) == ranked(rank, 60) == [pytest.approx(2.5 / 4)]
    assert rank(answer(fault=ParseFault.NO_BOX), truth) == 0.0 and not rank.pending


def test_equal_answers_of_a_group_earn_the_same_quantile():
    mixture = RewardMixture({"q": {"fn": Quantile(iou, 64), "weight": 1.0}})
    truth, spread = sample(block(0, 0, SIDE, SIDE)), [answer(block(0, 0, SIDE, c)) for c in (10, 30, 50, 70)]
    mixture(spread, [truth])
    same = mixture([answer(block(0, 0, SIDE, 60))] * 4, [truth]).total
    assert (same == same[0, 0]).all() and same[0, 0].item() == pytest.approx(0.75)
    again = mixture(spread, [truth]).total[0].tolist()
    assert again == sorted(again) and len(set(again)) == 4  # and better ones more


def test_a_mixture_keeps_what_its_quantiles_remember():
    mixture = RewardMixture({"q": {"fn": Quantile(iou, 3), "weight": 1.0}, "i": {"fn": iou, "weight": 1.0}})
    mixture([answer(block(0, 0, SIDE, 30))], [sample(block(0, 0, SIDE, SIDE))])
    fresh = RewardMixture({"q": {"fn": Quantile(iou, 3), "weight": 1.0}})
    fresh.restore(mixture.state())
    assert fresh.state() == {"q": [0.3]}


def test_reasoning_and_repetition():
    assert [reasoned(answer(fault=f), sample()) for f in (ParseFault.NO_THOUGHT, ParseFault.NO_ANSWER)] == [
        0,
        0,
    ]
    assert reasoned(answer(fault=ParseFault.BAD_NUMBERS), sample()) == 1.0
    assert reasoned(answer(fault=ParseFault.DUPLICATE_FIELD), sample()) == 0.0
    assert reasoned(answer(fault=ParseFault.BAD_NUMBERS, rest="and so on"), sample()) == 0.0
    for text, paid in (("A. B. A. C.", 1.0), ("A. B. A. B.", 0.0), ("<think> A. A. A. A", 0.0), ("", 1.0)):
        assert unrepeated(replace(answer(thought="A. A. A. A."), text=text), sample()) == paid


@pytest.mark.parametrize(
    ("parsed", "share"),
    [
        ({}, 1.0),
        ({"rest": "and so on"}, 0.0),
        ({"fault": ParseFault.NO_POINTS, "partly": 0.75}, 0.75),
        ({"fault": ParseFault.NO_POINTS, "partly": 0.75, "rest": "and so on"}, 0.0),
        ({"fault": ParseFault.BAD_JSON}, 0.0),
        ({"loose": True}, 0.0),
        ({"loose": True, "partly": 0.5}, 0.5),
    ],
)
def test_vision_reasoners_format_pays_the_share_that_is_there(parsed, share):
    assert objects_formed(answer(**parsed), sample()) == share


def test_what_is_read_loosely_is_paid_by_its_mask_and_by_nothing_that_was_published_otherwise():
    truth, loose = sample(SMALL), answer(SMALL, [tight_box(SMALL)], [inner_point(SMALL)], loose=True)
    assert iou(loose, truth) == 1.0 and reasoned(loose, truth) == 1.0
    assert MATCHED(loose, truth) == geometry.box_overlaps(loose, truth, threshold=0.5) == 0.0
    assert well_formed(loose, truth) == parses(loose, truth) == 0.0


def test_overlong_falls_over_the_margin_and_nothing_is_paid_for_what_was_cut_off():
    paid = [overlong(answer(length=n), sample(), budget=40, margin=10) for n in (5, 30, 35, 40)]
    assert paid == [1.0, 1.0, 0.5, 0.0]
    assert overlong(answer(length=40, finished=False), sample(), budget=100, margin=10) == 0.0
    fifth = [overlong(answer(length=n), sample(), budget=400, margin=None) for n in (320, 360, 400)]
    assert fifth == [1.0, 0.5, 0.0]


SMALL, TALL = block(10, 10, 30, 40), block(50, 60, 95, 90)


def test_seg_zeros_terms_by_hand():
    truth, box = sample(SMALL), tight_box(SMALL)
    right = answer(boxes=[box], points=geometry.two_points(SMALL))
    near = answer(boxes=[box + 0.005], points=geometry.two_points(SMALL)[::-1])
    far = answer(boxes=[box + 0.2], points=[[0.9, 0.9], [0.9, 0.8]])
    for term, expected in (
        (partial(geometry.box_overlaps, threshold=0.5), [1, 1, 0]),
        (partial(geometry.box_is_near, tolerance=10 / 840), [1, 1, 0]),
        (partial(geometry.points_are_near, tolerance=100 / 840), [1, 1, 0]),
    ):
        assert [term(a, truth) for a in (right, near, far)] == expected


def test_two_points_lie_in_the_object_apart():
    first, second = geometry.two_points(TALL)
    for x, y in (first, second):
        assert TALL[int(y * SIDE), int(x * SIDE)]
    assert np.linalg.norm(first - second) > 0.1


MATCHED = partial(geometry.matched, overlap=0.5, box_tolerance=10 / 840, point_tolerance=30 / 840)


def named(*masks):
    return answer(boxes=[tight_box(m) for m in masks], points=[inner_point(m) for m in masks])


def test_objects_are_matched_in_any_order_and_over_the_larger_number():
    truth = sample(SMALL, TALL)
    assert MATCHED(named(SMALL, TALL), truth) == MATCHED(named(TALL, SMALL), truth) == 3.0
    assert MATCHED(named(SMALL), truth) == 1.5
    assert MATCHED(named(SMALL, SMALL), truth) == 1.5
    assert MATCHED(named(SMALL, TALL, block(0, 80, 10, 99)), truth) == 2.0


def test_the_matching_is_the_best_of_all_permutations():
    from itertools import permutations

    rng = np.random.default_rng(0)
    for _ in range(20):
        masks = [block(t, x, t + 20, x + 20) for t, x in rng.integers(0, 80, (3, 2))]
        said = [block(t, x, t + 20, x + 22) for t, x in rng.integers(0, 78, (3, 2))]
        one = {(i, j): MATCHED(named(said[i]), sample(masks[j])) for i in range(3) for j in range(3)}
        best = max(sum(one[i, order[i]] for i in range(3)) for order in permutations(range(3))) / 3
        assert MATCHED(named(*said), sample(*masks)) == pytest.approx(best)


def test_the_matching_term_pays_an_answer_without_objects_where_there_are_none():
    assert MATCHED(answer(), sample()) == 3.0
    assert MATCHED(named(SMALL), sample()) == MATCHED(answer(), sample(SMALL)) == 0.0


def test_a_mask_without_separate_objects_is_one_object():
    whole = Sample(id="s", image=np.zeros((SIDE, SIDE, 3), np.uint8), mask=SMALL | TALL)
    assert len(geometry.objects_of(whole)) == 1 and len(geometry.objects_of(sample(SMALL, TALL))) == 2


# As published, an empty mask is paid; a quantile is relative by construction, and tested above.
REWARDS = sorted(
    p.stem
    for p in (conf_folder() / "reward").glob("*.yaml")
    if p.stem not in ("seg_r1_published", "quantile")
)


def mixture_of(name):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return instantiate(compose("train", [f"reward={name}"]).reward)


@pytest.mark.parametrize("name", REWARDS)
def test_a_policy_that_does_not_look_earns_much_less_than_one_that_does(name):
    """Everything, nothing and the middle are compared with the truth, over many scenes."""
    rng = np.random.default_rng(0)
    masks = [
        block(t, x, t + h, x + w)
        for t, x, h, w in zip(*rng.integers(5, 60, (2, 40)), *rng.integers(10, 40, (2, 40)), strict=True)
    ]
    full, none, middle = block(0, 0, SIDE, SIDE), block(0, 0, 0, 0), block(30, 30, 70, 70)
    looks = {"everything": full, "nothing": none, "middle": middle}

    def earned(see):
        mixture = mixture_of(name)
        answers, truths = [], []
        for mask in masks:
            seen = see(mask)
            boxes = [tight_box(seen)] if seen.any() else []
            points = geometry.two_points(seen)[: 1 if name == "vision_reasoner" else 2] if seen.any() else []
            answers.append(answer(seen, boxes, points, thought="there"))
            truths.append(sample(mask))
        terms = mixture(answers, truths).terms
        judged = [t for t in terms if t not in ("format", "reasoning", "unrepeated", "overlong")]
        return sum(float(terms[t].mean()) for t in judged) / len(judged)

    right = earned(lambda mask: mask)
    assert right >= 0.99
    for kind, mask in looks.items():
        assert earned(lambda _, mask=mask: mask) < 0.55 * right, kind
