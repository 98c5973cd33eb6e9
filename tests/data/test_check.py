"""Is a download whole? The report, and its command line."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import coco, folders, photograph, polygon, reason, ref, truth
from PIL import Image

from segrl.data.check import Report, check
from segrl.data.image_mask import ImageMaskFolders
from segrl.data.jsonl import JsonlDataset
from segrl.data.survey import Survey

PAIR = {"images": "i", "masks": "m"}


def report(surveys: dict[str, Survey], **published: int) -> Report:
    return check(surveys, published, lambda line: None, threads=2)


def surveyed(root: Path, **keys: object) -> Survey:
    return ImageMaskFolders.survey(str(root), [{**PAIR, **keys}], None)


def test_a_whole_dataset_has_nothing_wrong(tmp_path: Path) -> None:
    folders(tmp_path, "i", "m", ("a", "b#1", "c"))
    found = report({"test": surveyed(tmp_path)}, test=3)
    (split,) = found.splits
    assert not found.wrong and not split.wrong
    assert (split.samples, split.images, split.kinds) == (3, 3, {"0/255": 3})
    assert split.share == (24 / 384, 24 / 384, 24 / 384)
    assert not (split.faults or split.empty or split.full or split.other_size or split.turned)


def test_orphans_and_counts_are_wrong_and_nothing_stops_the_walk(tmp_path: Path) -> None:
    folders(tmp_path, "i", "m", ("a", "b", "c", "d"))
    photograph(tmp_path / "i" / "alone.jpg")
    truth(tmp_path / "m" / "widow.png")
    (tmp_path / "i" / "b.jpg").write_bytes(b"no image")
    (tmp_path / "m" / "c.png").write_bytes(b"no image")
    found = report({"test": surveyed(tmp_path)}, test=4)
    (split,) = found.splits
    assert (split.samples, split.without_mask, split.without_image) == (4, ["alone"], ["widow"])
    assert [Path(line.split(":")[0]).name for line in split.faults] == ["b.jpg", "c.png"]
    assert found.wrong
    text = "\n".join(found.lines())
    for words in ("4 samples", "published 4: as it should be", "alone", "widow", "b.jpg", "c.png"):
        assert words in text, words


@pytest.mark.parametrize(("published", "wrong"), [(2, False), (3, True), (None, False)])
def test_a_count_that_differs_from_the_published_one_is_wrong(
    tmp_path: Path, published: int | None, wrong: bool
) -> None:
    folders(tmp_path, "i", "m", ("a", "b"))
    found = check({"test": surveyed(tmp_path)}, {"test": published}, lambda line: None, 1)
    assert found.wrong is wrong
    assert ("DIFFERS" in found.lines()[0]) is wrong


def masks(tmp_path: Path) -> dict[str, Image.Image]:
    """One of every kind that is published somewhere."""
    on = np.zeros((16, 24), np.uint8)
    on[4:8, 6:12] = 1
    graded = on * 255
    graded[0, 0] = 90
    palette = Image.fromarray(on, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    return {
        "0/255": Image.fromarray(on * 255), "0/1": Image.fromarray(on), "graded": Image.fromarray(graded),
        "palette": palette, "1 bit": Image.fromarray(on * 255).convert("1"),
        "3 channels, 0/255": Image.fromarray(on * 255).convert("RGB"),
        "16 bit, 0/65535": Image.fromarray(on.astype(np.uint16) * 65535), "16 bit, 0/1": Image.fromarray(on.astype(np.uint16)),
    }  # fmt: skip


def test_every_kind_of_mask_is_told_apart(tmp_path: Path) -> None:
    kinds = masks(tmp_path)
    for number, image in enumerate(kinds.values()):
        photograph(tmp_path / "i" / f"{number}.jpg", number)
        (tmp_path / "m").mkdir(exist_ok=True)
        image.save(tmp_path / "m" / f"{number}.png")
    (split,) = report({"test": surveyed(tmp_path)}).splits
    assert split.kinds == dict.fromkeys(kinds, 1)
    assert len(split.faults) == 1 and "palette" in split.faults[0]
    assert split.share == (24 / 384,) * 3, "all the others are the same object"


def test_empty_and_full_masks_are_told_and_are_not_wrong(tmp_path: Path) -> None:
    folders(tmp_path, "i", "m", ("a", "b", "c"))
    for name, value in (("a", 0), ("b", 255)):
        Image.fromarray(np.full((16, 24), value, np.uint8)).save(tmp_path / "m" / f"{name}.png")
    found = report({"test": surveyed(tmp_path)})
    (split,) = found.splits
    assert (split.empty, split.full, found.wrong) == (["a"], ["b"], False)
    assert split.share == (0, 24 / 384, 1)


def test_sizes_that_differ_are_told_and_wrong_unless_the_masks_are_resized(tmp_path: Path) -> None:
    photograph(tmp_path / "i" / "a.jpg", size=(400, 200))
    truth(tmp_path / "m" / "a.png", size=(399, 200))
    (split,) = report({"test": surveyed(tmp_path)}).splits
    assert split.other_size == ["a: image 400x200, mask 399x200"] and split.wrong
    (split,) = report({"test": surveyed(tmp_path, resize_masks=True)}).splits
    assert split.other_size == ["a: image 400x200, mask 399x200"] and not split.wrong


def test_a_rotated_photograph_with_an_upright_mask_is_told_and_fits(tmp_path: Path) -> None:
    folders(tmp_path, "i", "m", ("a", "b"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((24, 16, 3), np.uint8)).save(tmp_path / "i" / "a.jpg", exif=exif.tobytes())
    (split,) = report({"test": surveyed(tmp_path)}).splits
    assert (split.turned, split.other_size, split.wrong) == (["a"], [], False)


def test_the_same_bytes_in_two_splits_are_told(tmp_path: Path) -> None:
    folders(tmp_path / "train", "i", "m", ("COD10K-CAM-1-Aquatic-3-Crab-32", "b"))
    folders(tmp_path / "test", "i", "m", ("x", "y"))
    for name in ("i/x.jpg", "i/y.JPG"):
        photograph(tmp_path / "test" / name, seed=90 + len(name))
    shutil.copy(
        tmp_path / "train" / "i" / "COD10K-CAM-1-Aquatic-3-Crab-32.jpg", tmp_path / "test" / "i" / "x.jpg"
    )
    found = report({name: surveyed(tmp_path / name) for name in ("train", "test")})
    assert found.duplicates == ["train/COD10K-CAM-1-Aquatic-3-Crab-32 = test/x"]
    assert not found.wrong, "COD10K is published with two of them"


def test_a_list_is_checked_like_folders(tmp_path: Path) -> None:
    folders(tmp_path, "i", "m", ("a", "b"))
    lines = [{"image": "i/a.jpg", "mask": "m/a.png"}, {"image": "i/z.jpg", "mask": "m/a.png"}]
    path = tmp_path / "l.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (split,) = report({"test": JsonlDataset.survey(str(path), None, None)}).splits
    assert (split.samples, split.without_image, split.wrong) == (1, ["line 2 (i/z.jpg)"], True)


# --- the command line


def run(cli, *arguments: str) -> tuple[int, str, str]:
    return cli("check", *arguments, module="prepare", runs=None)


def test_a_training_set_is_checked_with_its_test_sets_and_its_licence(cli, tmp_path: Path) -> None:
    root = tmp_path / "datasets"
    camo = root / "CAMO-V.1.0-CVIU2019"
    folders(root / "COD10K-v3", "Train/Image", "Train/GT_Object", ("COD10K-CAM-1", "COD10K-NonCAM-2"))
    folders(root / "COD10K-v3", "Test/Image", "Test/GT_Object", ("COD10K-CAM-3",))
    folders(camo, "Images/Train", "GT", ("camourflage_1", "camourflage_2"))
    before = {p: hashlib.sha1(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}
    code, out, err = run(cli, "data=cod10k_camo", f"data.root={root}")
    assert code == 1, err
    assert "train: 3 samples" in out and "published 4040: DIFFERS" in out and "published 2026: DIFFERS" in out
    assert "train: 3 of 3" in err
    counts = ("data.published.train=3", "data.published.cod10k=1", f"out={tmp_path / 'r.json'}")
    code, out, err = run(cli, "data=cod10k_camo", f"data.root={root}", *counts)
    assert code == 0, (out, err)
    assert "licence of data: COD10K: non-commercial purposes only" in out
    assert [s["name"] for s in json.loads((tmp_path / "r.json").read_text())["splits"]] == ["train", "cod10k"]
    assert before == {p: hashlib.sha1(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}
    shutil.rmtree(camo / "Images")
    code, out, _ = run(cli, "data=cod10k_camo", f"data.root={root}", *counts[:2])
    assert code == 1 and "there is no" in out and "train: 1 samples" in out


def test_test_sets_are_checked_by_name_one_or_several(cli, tmp_path: Path) -> None:
    folders(tmp_path / "ecssd", "images", "ground_truth_mask", ("0001", "0002"))
    reason(tmp_path / "rs" / "val", "a", ["what?"], [polygon("ignore", (1, 1), (5, 1), (5, 5))])
    (tmp_path / "rs" / "val" / "b.json").write_text("{")
    photograph(tmp_path / "rs" / "val" / "b.jpg")
    code, out, err = run(
        cli, "testset=[ecssd,reasonseg_val]", f"testsets.ecssd.root={tmp_path / 'ecssd'}", "testsets.ecssd.published=2",
        f"testsets.reasonseg_val.root={tmp_path / 'rs'}", "testsets.reasonseg_val.published=1",
    )  # fmt: skip
    assert code == 1, err
    assert "ecssd: 2 samples on 2 images (published 2: as it should be)" in out
    assert "b.json: JSON is needed" in out and "ignored regions   in 1" in out
    assert "licence of reasonseg_val: not stated" in out
    whole = ("testset=ecssd", f"testsets.ecssd.root={tmp_path / 'ecssd'}", "testsets.ecssd.published=2")
    assert run(cli, *whole)[0] == 0


def test_all_sentences_of_a_refer_split_are_counted_whatever_a_run_draws(cli, tmp_path: Path) -> None:
    refs = [
        ref(1, "train", 11, ("one", "two")),
        ref(2, "train", 12, ("three",)),
        ref(3, "val", 21, ("four",), image=2),
        ref(4, "train", 99, ("of no object",)),
        ref(5, "train", 11, ("of no image",), image=7),
    ]
    coco(tmp_path, "images/mscoco/images/train2014", "refcocog", "refs(umd).p", refs)
    code, out, err = run(
        cli, "data=refcocog", f"data.root={tmp_path}", "data.published={train:3,refcocog_val:1}"
    )
    assert code == 1, err
    assert "train: 3 samples on 1 images (published 3: as it should be)" in out
    assert "ref 4 names object 99" in out and "ref 5 is of image 7" in out
    (tmp_path / "refcocog" / "refs(umd).p").unlink()
    code, out, _ = run(cli, "data=refcocog", f"data.root={tmp_path}")
    assert code == 1 and "a refs file is needed" in out


def test_traces_are_checked_without_masks(cli, tmp_path: Path) -> None:
    folders(tmp_path, "test/images", "test/masks", ("a",))
    good = {"image": "a.jpg", "thinking": "x", "solution": "<bbox>[1,1,9,9]</bbox> <points>[[4,4]]</points> <labels>[1]</labels>"}  # fmt: skip
    photograph(tmp_path / "a.jpg")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, (good, {**good, "image": "lost.jpg"}))))
    where = ("data=traces", f"data.root={tmp_path}", f"data.traces={tmp_path / 't.jsonl'}")
    code, out, err = run(cli, *where)
    assert code == 1 and "train: 1 samples" in out and "line 2 (lost.jpg)" in out, (out, err)
    assert "empty masks       0" in out
    (tmp_path / "t.jsonl").write_text(json.dumps(good))
    assert run(cli, *where)[0] == 0


def test_the_shards_of_fcot_are_checked_as_downloaded(cli, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(data, "PNG")
    solution = "<bbox>[4,3,20,15]</bbox> <points>[[8,8]]</points> <labels>[1]</labels>"
    images = [{"bytes": data.getvalue(), "path": "x.png"}, {"bytes": b"no image", "path": "y.png"}]
    table = pa.table(
        {"image": images, "thinking": ["t"] * 2, "problem": ["p"] * 2, "solution": [solution] * 2}
    )
    shards = tmp_path / "FCoT" / "data"
    shards.mkdir(parents=True)
    pq.write_table(table, shards / "train-00000-of-00001.parquet", row_group_size=1)
    folders(tmp_path / "DUTS", "DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask", ("a",))
    code, out, err = run(
        cli, "data=fcot", f"data.root={tmp_path / 'DUTS'}", f"data.traces={tmp_path / 'FCoT'}", "data.published={train:2,duts_te:1}",
    )  # fmt: skip
    assert code == 1, err
    assert "train: 2 samples on 1 images (published 2: as it should be)" in out and "cannot be decoded" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "data=NAME"),
        (("data=synthetic",), "SyntheticScenes"),
        (("data=duts",), "data.root: must be a file or folder with content; datasets/DUTS does not exist; its owners publish it at"),
        (("testset=nc4k",), "testsets.nc4k.root: must be a file or folder; datasets/NC4K does not exist (its owners publish it at"),
        (("testset=nc4",), "did you mean nc4k?"),
        (("data=image_mask",), "data.root: must be given"),
        (("data=image_mask", "data.root=.", "data.objects=[1]", "data.background=[0]"), "folders[0].background"),
        (("data=image_mask", "data.root=.", "out=report.txt"), "out: must be a .json file"),
        (("data=image_mask", "data.root=.", "data.rot=x"), "data.root"),
        (("data.root=.",), "data=NAME, or data=image_mask for folders"),
    ],
)  # fmt: skip
def test_a_mistake_costs_one_line_and_exits_with_two(
    cli, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = run(cli, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["a=b", "what?", "x[1]*", "~", "two words", "it's", "été 图像", "1e3", "a,b", "{c}", "x:y"]
)
def test_a_folder_of_any_name_is_checked(cli, tmp_path: Path, name: str) -> None:
    folders(tmp_path / name, "test/images", "test/masks", (name,))
    for folder in ("images", "masks"):
        shutil.copytree(tmp_path / name / "test" / folder, tmp_path / name / "train" / folder)
    code, out, err = run(cli, "data=image_mask", f'data.root="{tmp_path / name}"')
    assert code == 0 and "train: 1 samples" in out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("out=t.jsonl",), "head.checkpoint: must be a file or folder with content; weights/sam2.1_hiera_large.pt does not exist"),
        (("out=t.jsonl",), "head=sam2_nano, which ships with segrl"),
        (("out=old.jsonl",), "out: must be a new .jsonl file; old.jsonl exists (overwrite=true"),
        (("out=old.jsonl", "overwrite=true"), "head.checkpoint"), (("out=t.jsonl", "overwrite=3"), "overwrite: must be true or false"),
        (("out=t.txt",), "out: must be a .jsonl file"), (("out=3",), "out: must be a .jsonl file"),
        (("out=t.jsonl", "least_iou=nan"), "least_iou"), (("out=t.jsonl", "least_iou=true"), "least_iou"),
    ],
)  # fmt: skip
def test_writing_traces_says_what_it_lacks_before_it_reads_anything(
    cli, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "old.jsonl").write_text("x")
    code, out, err = cli("traces", "data.root=.", *arguments, module="prepare", runs=None)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]


def test_real_folders_pass_with_their_own_counts(cli, realdata: Path) -> None:
    where = ("data=duts", f"data.root={realdata / 'DUTS'}")
    assert run(cli, *where)[0] == 1
    assert run(cli, *where, "data.published={train:160,duts_te:40}")[0] == 0


def test_real_palette_masks_are_told_with_the_one_that_is_a_pixel_too_narrow(cli, realdata: Path) -> None:
    where = (
        "data=image_mask", f"data.root={realdata / 'davis_like'}", "data.train_images=images", "data.train_masks=masks",
        "data.test_images=images", "data.test_masks=masks",
    )  # fmt: skip
    code, out, _ = run(cli, *where)
    assert code == 1 and "palette in 5" in out and "judo_00005: image 854x480, mask 853x480" in out
    code, out, _ = run(cli, *where, "data.background=[0]")
    assert code == 1 and "resize_masks" in out
    assert run(cli, *where, "data.background=[0]", "data.resize_masks=true")[0] == 0
