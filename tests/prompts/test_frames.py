from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrl.prompts.frames import absolute_pixels, from_unit, permille, to_unit
from segrl.types import Frame


def test_absolute_pixels_put_width_on_x_and_height_on_y() -> None:
    assert absolute_pixels(height=480, width=640) == Frame(width=640, height=480)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1, 1), (756, 756)])
def test_permille_is_a_thousand_along_each_side_whatever_the_image(height: int, width: int) -> None:
    assert permille(height, width) == Frame(width=1000, height=1000)


def test_to_unit_divides_x_by_width_and_y_by_height() -> None:
    frame = Frame(width=640, height=480)
    np.testing.assert_array_equal(to_unit(np.array([320, 120]), frame), np.float32([0.5, 0.25]))
    np.testing.assert_array_equal(
        to_unit(np.array([64, 48, 640, 360]), frame), np.float32([0.1, 0.1, 1.0, 0.75])
    )


def test_from_unit_multiplies_x_by_width_and_y_by_height() -> None:
    frame = Frame(width=640, height=480)
    boxes = np.float32([[0.5, 0.25, 1.0, 0.75], [0.0, 0.0, 0.1, 0.1]])
    assert from_unit(boxes, frame).tolist() == [[320, 120, 640, 360], [0, 0, 64, 48]]


def test_from_unit_writes_the_nearest_integer() -> None:
    frame = Frame(width=10, height=10)
    assert from_unit(np.array([0.24, 0.26]), frame).tolist() == [2, 3]
    assert from_unit(np.array([0.24, 0.26]), frame).dtype == np.int64


def test_to_unit_clamps_into_the_image_on_every_side() -> None:
    frame = Frame(width=100, height=200)
    assert to_unit(np.array([-5, -1, 101, 1e6]), frame).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert to_unit(np.array([50, 201]), frame).tolist() == [0.5, 1.0]


def test_a_768_frame_read_as_756_would_shift_the_far_edge_by_twelve_pixels() -> None:
    assert from_unit(np.array([1.0, 1.0]), absolute_pixels(756, 756)).tolist() == [756, 756]
    assert float(to_unit(np.array([756.0, 0.0]), absolute_pixels(768, 768))[0]) == pytest.approx(1 - 12 / 768)


def test_no_points_stay_no_points() -> None:
    frame = permille(10, 10)
    assert from_unit(np.zeros((0, 2), np.float32), frame).tolist() == []
    assert to_unit(np.zeros((0, 4)), frame).shape == (0, 4)


@given(
    unit=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    frame=st.builds(absolute_pixels, height=st.integers(28, 2000), width=st.integers(28, 2000))
    | st.just(permille(7, 9)),
)
def test_writing_and_reading_moves_a_coordinate_by_half_a_frame_unit_at_most(
    unit: list[float], frame: Frame
) -> None:
    written = from_unit(np.float32(unit), frame)
    extent = np.tile([frame.width, frame.height], 2)
    error = np.abs(to_unit(written, frame).astype(np.float64) - np.float32(unit)) * extent
    assert error.max() <= 0.5 + 1e-3
    assert written.min() >= 0
    assert (written <= extent).all()


@given(
    whole=st.tuples(st.integers(0, 1036), st.integers(0, 728)),
    frame=st.just(absolute_pixels(height=728, width=1036)),
)
def test_reading_and_writing_a_whole_frame_coordinate_returns_it(
    whole: tuple[int, int], frame: Frame
) -> None:
    assert from_unit(to_unit(np.array(whole), frame), frame).tolist() == list(whole)
