"""The answers that the mask head is trained to give."""

import numpy as np

from segrl.nano.mask_head import _astray, _held

SHAPE = (True, 1, 0)


def disc(cy, cx, radius):
    y, x = np.mgrid[:64, :64]
    return np.hypot(y - cy, x - cx) < radius


def test_a_box_names_the_object_it_fits_and_otherwise_all_that_it_holds():
    """The whole image is never the answer to where the object is."""
    parts = [disc(20, 20, 12), disc(46, 46, 10)]
    mask, fitted, taken_whole = parts[0] | parts[1], 0, 0
    for seed in range(300):
        prompt, answer = _astray(np.random.default_rng(seed), mask, parts, SHAPE)
        held = _held(prompt.boxes[0], mask.shape)
        column, row = (prompt.points[0] * 64).astype(int)
        assert answer.any() and answer[row, column] and held[row, column]
        if (answer == held).all():
            taken_whole += 1
        else:
            (part,) = [p for p in parts if (answer == p).all()]
            box = _held(
                np.array(
                    [
                        np.nonzero(part)[1].min(),
                        np.nonzero(part)[0].min(),
                        *(np.array(np.nonzero(part))[::-1].max(1) + 1),
                    ]
                )
                / 64,
                mask.shape,
            )
            assert (box & held).sum() / (box | held).sum() >= 0.4
            fitted += 1
    assert fitted > 5 and taken_whole > 150
