from __future__ import annotations

import numpy as np
import pytest

from segrl.data.synthetic import SyntheticScenes


def scenes(
    split: str = "train", length: int = 200, seed: int = 0, size: int = 32,
    contrast: tuple[float, float] = (0.0, 1.0), objects: tuple[int, int] = (1, 3),
) -> SyntheticScenes:  # fmt: skip
    return SyntheticScenes(split, length, seed, size, contrast, objects)


def pictures(dataset: SyntheticScenes) -> list[bytes]:
    return [dataset[i].image.tobytes() for i in range(len(dataset))]


def distance(image: np.ndarray, mask: np.ndarray) -> float:
    """Return the distance of the mean colours inside and outside, in levels of 255."""
    return float(np.linalg.norm(image[mask].mean(0) - image[~mask].mean(0)))


def test_the_same_index_is_the_same_scene_in_any_order_and_process() -> None:
    first, again = scenes(), scenes()
    forwards = [first[i] for i in range(6)]
    backwards = [again[i] for i in reversed(range(6))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert one.id == other.id
        assert (one.image == other.image).all()
        assert (one.mask == other.mask).all()


def test_a_longer_split_begins_with_the_scenes_of_a_shorter_one() -> None:
    assert pictures(scenes(length=3)) == pictures(scenes(length=5))[:3]


def test_no_scene_of_one_split_is_a_scene_of_another_or_of_itself() -> None:
    train, test = pictures(scenes("train")), pictures(scenes("test"))
    assert len(set(train) | set(test)) == 400


def test_another_seed_draws_other_scenes() -> None:
    assert not set(pictures(scenes(length=20))) & set(pictures(scenes(length=20, seed=1)))


def test_no_mask_of_one_split_is_a_mask_of_another() -> None:
    train, test = (
        {s[i].mask.tobytes() for i in range(200)} for s in (scenes("train", size=48), scenes("test", size=48))
    )
    assert not train & test


def test_a_sample_is_the_scene_with_the_union_of_its_objects() -> None:
    dataset = scenes("held out", size=40)
    for index in (0, 7, 199):
        image, objects = dataset.scene(index)
        sample = dataset[index]
        assert sample.id == f"synthetic-held out-{index:06d}"
        assert sample.query is None
        assert (sample.image == image).all()
        assert (sample.mask == objects.any(0)).all()
        assert (sample.image.shape, sample.image.dtype, sample.mask.dtype) == (
            (40, 40, 3),
            np.uint8,
            np.bool_,
        )


def test_contrast_moves_the_objects_colour_away_from_the_ground_and_nothing_else() -> None:
    knob = [0.0, 0.25, 0.5, 0.75, 1.0]
    worlds = [scenes(length=40, size=48, contrast=(c, c), objects=(1, 1)) for c in knob]
    for index in range(40):
        masks = [world[index].mask for world in worlds]
        assert all((mask == masks[0]).all() for mask in masks)
        grounds = [world[index].image[~masks[0]] for world in worlds]
        assert all((ground == grounds[0]).all() for ground in grounds)
    means = [np.mean([distance(world[i].image, world[i].mask) for i in range(40)]) for world in worlds]
    steps = np.diff(means)
    assert (steps > 5).all(), means
    assert means[0] < 40 < 80 < means[-1]


def test_a_range_of_contrast_lies_between_its_ends() -> None:
    low, mixed, high = (
        np.mean([distance(w[i].image, w[i].mask) for i in range(60)])
        for w in (scenes(size=32, contrast=c, objects=(1, 1)) for c in ((0, 0), (0, 1), (1, 1)))
    )
    assert low + 5 < mixed < high - 5


@pytest.mark.parametrize("objects", [(1, 1), (2, 3), (4, 4)])
def test_as_many_objects_as_asked_for_and_all_of_them_visible(objects: tuple[int, int]) -> None:
    dataset = scenes(length=30, size=48, objects=objects)
    counts = set()
    for index in range(30):
        _, masks = dataset.scene(index)
        counts.add(len(masks))
        assert masks.sum(0).max() == 1, "visible parts do not overlap"
        assert masks.mean((1, 2)).min() >= 0.01
    assert counts == set(range(objects[0], objects[1] + 1))


def test_objects_lie_all_over_the_image() -> None:
    dataset = scenes(length=200, objects=(1, 1))
    often = np.mean([dataset[i].mask for i in range(200)], 0)
    quarters = [often[a, b].mean() for a in (np.s_[:16], np.s_[16:]) for b in (np.s_[:16], np.s_[16:])]
    assert max(quarters) < 2 * min(quarters)


def test_an_index_beyond_the_end_ends_a_loop() -> None:
    assert [sample.id[-1] for sample in scenes(length=2)] == ["0", "1"]
    for index in (2, -1):
        with pytest.raises(IndexError):
            scenes(length=2)[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, r"data\.train\.length.*got 0"),
        ({"contrast": (0.6, 0.5)}, r"data\.contrast.*got \[0\.6, 0\.5\]"),
        ({"contrast": (-0.1, 0.5)}, r"data\.contrast"),
        ({"contrast": (0.5, 1.1)}, r"data\.contrast"),
        ({"objects": (0, 2)}, r"data\.objects.*got \[0, 2\]"),
        ({"objects": (3, 2)}, r"data\.objects"),
    ],
)
def test_impossible_settings_are_refused_by_their_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes(**change)
