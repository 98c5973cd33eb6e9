"""Fixtures: pairs of map and truth with the scores that other implementations gave them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
SETS = {
    "sod80/PiCANet": ("saliency_maps/preds/PiCANet", "saliency_maps/masks"),
    "sod80/DSS": ("saliency_maps/preds/DSS", "saliency_maps/masks"),
    "sod80/Amulet": ("saliency_maps/preds/Amulet", "saliency_maps/masks"),
    "sod80/PiCANet_binarised128": ("saliency_maps/preds/PiCANet", "saliency_maps/masks"),
    "cod10k3/SINet": ("cod10k_maskpred/preds_SINet", "cod10k_maskpred/masks"),
    "pysod_test_data": ("pysod_test_data/preds", "pysod_test_data/masks"),
    "smeasure_demo": ("smeasure_demo/demo/FG", "smeasure_demo/demo/GT"),
}


@dataclass(frozen=True)
class Pair:
    """A map, its truth, and the scores that pysodmetrics gave them."""

    saliency: np.ndarray
    truth: np.ndarray
    expected: dict


@dataclass(frozen=True)
class Published:
    """A set of pairs, with the scores that pysodmetrics gave the whole set."""

    pairs: dict[str, Pair]
    dataset: dict[str, float]
    curves: dict[str, np.ndarray]


def read(path: Path) -> np.ndarray:
    """Read an 8-bit grey map; of a 16-bit one the upper byte, as OpenCV reads it."""
    image = Image.open(path)
    return (
        (np.asarray(image) >> 8).astype(np.uint8) if image.mode == "I;16" else np.asarray(image.convert("L"))
    )


@pytest.fixture(scope="session")
def published(realdata: Path) -> dict[str, Published]:
    """Return the real sets by name; they hold 338 pairs."""
    expected = json.loads((realdata / "pysod_expected.json").read_text())["sets"]
    assert expected.keys() == SETS.keys()
    sets = {}
    for name, (maps, truths) in SETS.items():
        pairs = {}
        for stem, scores in expected[name]["per_image"].items():
            of_truth = stem.split("_")[0] if name == "smeasure_demo" else stem
            saliency = read(realdata / maps / f"{stem}.png")
            if name.endswith("binarised128"):
                saliency = (saliency >= 128).astype(np.uint8) * np.uint8(255)
            pairs[stem] = Pair(saliency, read(realdata / truths / f"{of_truth}.png") > 128, scores)
        assert len(pairs) == expected[name]["n"]
        curves = {kind: np.array(expected[name][f"{kind}_curve"]) for kind in ("e", "f")}
        sets[name] = Published(pairs, expected[name]["dataset"], curves)
    return sets


@pytest.fixture(scope="session")
def edges(realdata: Path) -> dict[str, Pair]:
    """Return each published edge case of 40 x 60 pixels."""
    scores = json.loads((realdata / "pysod_expected.json").read_text())["edge_cases_40x60"]["cases"]
    maps = edge_maps()
    assert scores.keys() == maps.keys()
    return {name: Pair(saliency, truth > 128, scores[name]) for name, (saliency, truth) in maps.items()}


def edge_maps() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the map and the 8-bit truth of each published edge case."""

    def drawn(rows: slice, columns: slice, value: int = 255) -> np.ndarray:
        canvas = np.zeros((40, 60), np.uint8)
        canvas[rows, columns] = value
        return canvas

    everything, nothing = np.s_[:], np.s_[:0]
    square, shifted = drawn(np.s_[10:30], np.s_[20:40]), drawn(np.s_[12:32], np.s_[22:42])
    empty, full = drawn(nothing, nothing), drawn(everything, everything)
    pixel, last, first = (drawn(np.s_[y : y + 1], np.s_[x : x + 1]) for y, x in ((20, 30), (39, 59), (0, 0)))
    column, row = drawn(everything, np.s_[-1:]), drawn(np.s_[-1:], everything)
    return {
        "perfect_square": (square, square),
        "shifted_square": (shifted, square),
        "empty_pred_square_gt": (empty, square),
        "full_pred_square_gt": (full, square),
        "empty_pred_empty_gt": (empty, empty),
        "full_pred_empty_gt": (full, empty),
        "square_pred_empty_gt": (square, empty),
        "empty_pred_full_gt": (empty, full),
        "full_pred_full_gt": (full, full),
        "square_pred_full_gt": (square, full),
        "inverse": (255 - square, square),
        "one_pixel_gt_perfect": (pixel, pixel),
        "one_pixel_gt_full_pred": (full, pixel),
        "lastcol_gt": (column, column),
        "lastrow_gt": (row, row),
        "corner_gt": (last, last),
        "corner00_gt": (first, first),
        "gradient_pred_square_gt": (np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1)), square),
        "lowcontrast_pred_20_120(minmax-stretched)": ((20 + square // 255 * 100).astype(np.uint8), square),
        "constant128_pred": (drawn(everything, everything, 128), square),
        "constant127_pred": (drawn(everything, everything, 127), square),
        "gt_values_0_1_(all dropped by >128)": (square, square // 255),
        "gt_value_128_dropped": (square, square // 255 * 128),
        "gt_value_129_kept": (square, square // 255 * 129),
        "pred_values_0_1": (square // 255, square),
    }


@pytest.fixture(scope="session")
def small_maps() -> ModuleType:
    """Return the script that made tests/oracles/pysod_values.json."""
    spec = importlib.util.spec_from_file_location("pysod_values", ORACLES / "pysod_values.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small(small_maps: ModuleType) -> dict[str, Pair]:
    """Return each committed small map with the scores that pysodmetrics gave it."""
    scores = json.loads((ORACLES / "pysod_values.json").read_text())["cases"]
    maps = small_maps.cases()
    assert scores.keys() == maps.keys()
    for name, pair in maps.items():
        assert small_maps.checksum(*pair) == scores[name]["checksum"], name
    return {name: Pair(*pair, scores[name]) for name, pair in maps.items()}
