"""Folders of maps from any source are scored against ground truth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segrl.data.transforms import read_map

TRUTH = np.zeros((10, 12), np.uint8)
TRUTH[2:6, 3:8] = 255
MASK = np.roll(TRUTH, 1, 1)
IOU = 16 / 24  # 4 x 5, moved by one column


def write(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Write two maps: `a` has IoU 2/3, `b` is perfect."""
    for stem, mask in (("a", MASK), ("b", TRUTH)):
        write(tmp_path / "pred" / f"{stem}.png", mask)
        write(tmp_path / "gt" / f"{stem}.png", TRUTH)
    return tmp_path / "pred", tmp_path / "gt"


@pytest.fixture
def score(cli, folders):
    def run(*arguments: str):
        pred, gt = folders
        return cli(f"pred={pred}", f"gt={gt}", *arguments, module="score", runs=None)

    return run


@pytest.fixture
def refused(score, tmp_path):
    def run(*arguments: str) -> str:
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        code, out, err = score(*arguments)
        assert code == 2, (code, out, err)
        (line,) = err.splitlines()
        assert line.startswith("segrl: ")
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        return line

    return run


def test_two_maps_by_hand(score, tmp_path):
    code, out, err = score(f"out={tmp_path}/s.json", "metrics=[iou,ciou,mae]", "draws=200")
    assert code == 0, err
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["iou"] == pytest.approx((IOU + 1) / 2, abs=1e-15)
    assert found["ciou"] == pytest.approx((16 + 20) / (24 + 20), abs=1e-15)
    assert found["mae"] == pytest.approx(8 / 120 / 2, abs=1e-15)
    assert found["intervals"]["iou"] == pytest.approx([IOU, 1.0], abs=1e-12)
    assert found["n"] == 2 and "pred" in out and "0.8333 [0.6667, 1.0000]" in out and "pysodmetrics" in out
    assert list(found)[:3] == ["iou", "ciou", "mae"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gt", "pred", "s.json"]


def test_without_out_nothing_is_written(score, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = score("draws=0")
    assert code == 0 and "0.8333" in out and "[" not in out.split("pysodmetrics")[0], err
    assert sorted(tmp_path.rglob("*")) == before


def test_maps_pair_by_stem_whatever_their_extension_and_system_files_are_left_out(score, folders):
    pred, gt = folders
    for name in ("Thumbs.db", ".DS_Store", "._a.png", "notes.txt"):
        (pred / name).write_bytes(b"x")
    (pred / "a.png").rename(pred / "a.PNG")
    Image.fromarray(TRUTH).save(pred / "b.bmp")
    (pred / "b.png").unlink()
    code, out, err = score("metrics=[iou]")
    assert code == 0 and "0.8333" in out, err


def test_keep_takes_part_of_both_folders(score, folders):
    write(folders[1] / "NonCAM-1.png", TRUTH)
    write(folders[0] / "other.png", TRUTH)
    code, out, err = score("metrics=[iou]", "keep=a")  # NonCAM has a capital A
    assert code == 0 and f"{IOU:.4f}" in out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["metrics=[sm,iuo]"], ["metrics", "iuo"]),
        (["metrics=[]"], ["metrics", "a list, not empty, of", "got []"]),
        (["metric=[sm]"], ["metric", "metrics"]),
        (["out=nowhere/s.json"], ["out", "nowhere"]),
        (["out=s.txt"], ["out", ".json"]),
        (["draws=-1"], ["draws", "-1"]),
        (["draws=x"], ["draws", "x"]),
        (["seed=-1"], ["seed", "-1"]),
        (["seed=x"], ["seed", "x"]),
        (["pred=nowhere"], ["pred", "nowhere"]),
        (["gt=nowhere"], ["gt", "nowhere"]),
        (["keep=zebra"], ["gt", "zebra"]),
        (["keep=8"], ["gt", "8"]),
        (["metrics=moe"], ["metrics", "moe"]),
        (["out=/proc/s.json"], ["/proc/s.json", "no such file"]),
    ],
)
def test_one_line_names_the_key(refused, arguments, words):
    line = refused(*arguments)
    assert all(word in line for word in words), line


def test_pred_and_gt_are_needed(cli):
    code, _, err = cli(module="score", runs=None)
    assert code == 2 and len(err.splitlines()) == 1 and "pred" in err


def test_files_that_stand_alone_or_twice_are_named(refused, folders):
    pred, gt = folders
    extra = write(pred / "c.png", TRUTH)
    assert "c" in refused().split("none for")[1] and "gt:" in refused()
    extra.rename(gt / "c.png")
    assert "c" in refused().split("none for")[1] and "pred:" in refused()
    (gt / "c.png").rename(pred / "a.bmp")
    assert "a.bmp" in refused() and "a.png" in refused()


@pytest.mark.parametrize("fault", ["size", "palette", "colour", "cut", "truth"])
def test_an_unfit_map_is_named(refused, folders, tmp_path, fault):
    path = folders[fault == "truth"] / "b.png"
    if fault == "size":
        write(path, TRUTH[:-1])
    elif fault == "palette":
        image = Image.fromarray(TRUTH // 255, "P")
        image.putpalette([0, 0, 0, 128, 0, 0])
        image.save(path)
    elif fault == "colour":
        write(path, np.stack([TRUTH, TRUTH, TRUTH * 0], -1))
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:50])
    else:
        write(path, TRUTH // 255 * 90)
    assert "b.png" in refused(f"out={tmp_path}/s.json")


def test_masks_of_zero_and_one_are_masks(score, folders):
    """They are not read as grey maps that are almost black."""
    code, before, _ = score("metrics=[mae,sm,iou,biou]")
    for stem in "ab":
        path = folders[0] / f"{stem}.png"
        write(path, np.asarray(Image.open(path)) // 255)
    assert score("metrics=[mae,sm,iou,biou]")[:2] == (code, before) and code == 0


def test_one_metric_needs_no_brackets(score):
    assert "mae" in score("metrics=mae")[1]


# --- read_map


def test_every_kind_of_file_reads_as_its_grey_values(tmp_path):
    grey = np.arange(120, dtype=np.uint8).reshape(10, 12) * 2
    assert (read_map(write(tmp_path / "l.png", grey)) == grey).all()
    assert (read_map(write(tmp_path / "rgb.png", np.stack([grey] * 3, -1))) == grey).all()
    assert (read_map(write(tmp_path / "rgba.png", np.stack([grey] * 3 + [grey * 0], -1))) == grey).all()
    one = tmp_path / "one.png"
    Image.fromarray(TRUTH).convert("1").save(one)
    assert (read_map(one) == TRUTH).all() and read_map(one).dtype == np.uint8
    palette = tmp_path / "p.png"
    Image.fromarray(grey).convert("P").save(palette)
    assert (read_map(palette) == grey).all()


def test_of_sixteen_bits_the_upper_eight_count_as_opencv_reads_them(tmp_path):
    import cv2

    deep = np.random.default_rng(0).integers(0, 65536, (10, 12)).astype(np.uint16)
    path = write(tmp_path / "deep.png", deep)
    assert (read_map(path) == deep >> 8).all()
    assert (read_map(path) == cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)).all()
    assert (read_map(write(tmp_path / "shallow.png", TRUTH.astype(np.uint16))) == TRUTH).all()


def test_an_empty_mask_in_a_palette_file_is_read_as_empty(score, folders):
    image = Image.fromarray(TRUTH * 0, "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(folders[0] / "a.png")
    assert not read_map(folders[0] / "a.png").any()
    code, out, err = score("metrics=[iou]", "draws=0")
    assert code == 0 and "0.5000" in out, err


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "segrl.score", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "metrics" in done.stdout
    assert not [name for name in (" torch\n", " lightning\n", " mlflow\n") if name in done.stderr]
