"""Score small maps, grey and binary, by pysodmetrics' own code in an environment of its own.

    uv run --isolated --no-project --python 3.11 \
        --with pysodmetrics==1.6.2 --with numpy==2.3.4 --with scipy==1.17.1 \
        --with scikit-image==0.25.2 --with opencv-python-headless==4.14.0.94 tests/oracles/pysod_values.py

writes pysod_values.json beside this file. Tests import `cases` from here to make the same maps again. They
are made by integer arithmetic alone, so that every version of numpy makes the same ones.
"""

import json
import math
import warnings
import zlib
from pathlib import Path

import numpy as np

THRESHOLDS = range(0, 256, 15)  # of the curves, by place: 0 is the threshold 255


def noise(height, width, seed):
    """Return values from 0 to 255 by hashing the position."""
    y, x = np.mgrid[:height, :width].astype(np.uint64)
    mixed = (y * 73856093 + x * 19349663 + np.uint64(seed * 83492791 + 12345)) % 2**32
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor) % 2**32
    return (mixed >> np.uint64(11) & np.uint64(255)).astype(np.int64)


def disc(height, width, cy, cx, radius):
    """Draw a disc whose squared radius is radius * radius, in pixels."""
    y, x = np.mgrid[:height, :width]
    return (y - cy) ** 2 + (x - cx) ** 2 < radius * radius


def soft(truth, seed, contrast=150):
    """Return a grey map with the truth in it: its mean over 5x5 pixels, with noise."""
    padded = np.pad(truth.astype(np.int64), 2)
    height, width = truth.shape
    near = sum(padded[i : i + height, j : j + width] for i in range(5) for j in range(5))
    return np.clip(near * contrast // 25 + noise(height, width, seed) * 90 // 255, 0, 255)


def cases():
    """Return (uint8 map, bool truth) by name."""
    square = np.zeros((40, 60), bool)
    square[10:30, 20:40] = True
    pixel = disc(31, 45, 13, 22, 1)
    blob = disc(37, 53, 17, 25, 11)
    two = disc(64, 64, 20, 20, 12) | disc(64, 64, 50, 45, 7)
    border = disc(41, 59, 0, 58, 15)
    lines = np.zeros((50, 70), bool)
    lines[::7, 5:60] = True
    lines[10:45, ::11] = True
    ring = disc(57, 61, 28, 30, 22) & ~disc(57, 61, 28, 30, 16)
    speckle = noise(33, 47, 7) < 40
    last_row, last_column, last_pixel = (np.zeros((23, 29), bool) for _ in range(3))
    last_row[-1], last_column[:, -1], last_pixel[-1, -1] = True, True, True
    empty, full = np.zeros((21, 34), bool), np.ones((21, 34), bool)
    upper = np.zeros((24, 30), bool)
    upper[1:3, 1:4] = True
    on = np.int64(255)
    made = {
        "square_perfect": (square * on, square),
        "square_shifted": (np.roll(square, (2, 2), (0, 1)) * on, square),
        "square_inverse": (~square * on, square),
        "square_low_contrast": (20 + 100 * square, square),
        "square_soft": (soft(square, 1), square),
        "square_noise": (noise(40, 60, 2), square),
        "square_two_levels": (square * 200 + 55 * (noise(40, 60, 3) > 128), square),
        "square_constant_90": (np.full((40, 60), 90), square),
        "square_empty": (np.zeros((40, 60)), square),
        "square_full": (np.full((40, 60), 255), square),
        "blob_soft": (soft(blob, 4), blob),
        "blob_larger": (disc(37, 53, 16, 27, 15) * on, blob),
        "blob_smaller": (disc(37, 53, 18, 24, 6) * on, blob),
        "blob_holes": ((blob & (noise(37, 53, 5) > 60)) * on, blob),
        "two_one_found": (disc(64, 64, 20, 20, 12) * on, two),
        "two_soft": (soft(two, 6, 220), two),
        "two_speckled": ((two ^ (noise(64, 64, 8) < 20)) * on, two),
        "border_soft": (soft(border, 9), border),
        "border_shifted": (disc(41, 59, 3, 55, 15) * on, border),
        "pixel_perfect": (pixel * on, pixel),
        "pixel_disc": (disc(31, 45, 13, 22, 5) * on, pixel),
        "pixel_noise": (noise(31, 45, 10), pixel),
        "lines_soft": (soft(lines, 11, 200), lines),
        "lines_shifted": (np.roll(lines, 3, 1) * on, lines),
        "ring_filled": (disc(57, 61, 28, 30, 22) * on, ring),
        "ring_soft": (soft(ring, 12), ring),
        "speckle_noise": (noise(33, 47, 13), speckle),
        "speckle_binary": ((noise(33, 47, 14) < 60) * on, speckle),
        "empty_noise": (noise(21, 34, 15), empty),
        "empty_empty": (np.zeros((21, 34)), empty),
        "full_noise": (noise(21, 34, 16), full),
        "full_empty": (np.zeros((21, 34)), full),
        "row_of_9": (noise(1, 9, 17), noise(1, 9, 18) > 100),
        "two_by_two": (np.array([[0, 80], [255, 160]]), np.array([[False, False], [True, False]])),
        "last_row": (soft(last_row, 19), last_row),
        "last_column": (soft(last_column, 20), last_column),
        "last_pixel": (soft(last_pixel, 21), last_pixel),
        "upper_constant_77": (np.full((24, 30), 77), upper),
    }
    return {name: (map_.astype(np.uint8), truth) for name, (map_, truth) in made.items()}


def checksum(saliency, truth):
    """Return a checksum of both arrays, by which a test knows that it makes the maps that were scored."""
    return zlib.crc32(saliency.tobytes() + truth.tobytes())


def scores(saliency, truth):
    """Return every score of one pair; None for NaN."""
    import py_sod_metrics as peer

    metrics = {
        "mae": peer.MAE(), "sm": peer.Smeasure(), "em": peer.Emeasure(), "fm": peer.Fmeasure(beta=0.3),
        "wfm": peer.WeightedFmeasure(), "hce": peer.HumanCorrectionEffortMeasure(),
    }  # fmt: skip
    found = {}
    for name, metric in metrics.items():
        metric.step(saliency, truth.astype(np.uint8) * 255)
        value = metric.get_results()[name]
        if isinstance(value, dict):
            curve = np.asarray(value["curve"], np.float64)
            value = {
                "adaptive": float(value["adp"]),
                "mean": float(curve.mean()),
                "max": float(curve.max()),
                "curve": [float(curve[i]) for i in THRESHOLDS],
            }
        elif math.isnan(value):
            value = None
        else:
            value = float(value)
        found[name] = value
    return found


def main():
    """Write the fixture."""
    from importlib.metadata import version

    packages = ("pysodmetrics", "numpy", "scipy", "scikit-image", "opencv-python-headless")
    found = {
        "versions": {name: version(name) for name in packages},
        "cases": {name: {"checksum": checksum(*pair), **scores(*pair)} for name, pair in cases().items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
