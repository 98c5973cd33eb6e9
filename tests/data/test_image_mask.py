from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import pair
from PIL import Image

from segrl.data.image_mask import ImageMaskFolders

VALUES = np.zeros((4, 6), np.uint8)
VALUES[1:3, 2:5] = 255


def write(folder: Path, *names: str, values: np.ndarray = VALUES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with (folder / name).open("wb") as file:  # Pillow must not guess from upper-case names
            Image.fromarray(values).save(
                file, "JPEG" if Path(name).suffix.lower() in {".jpg", ".jpeg"} else "PNG"
            )
    return folder


def names(pairs: list[tuple[Path, Path]]) -> list[tuple[str, str]]:
    return [(image.name, mask.name) for image, mask in pairs]


# --- pairing


def test_images_and_masks_are_paired_by_stem_in_order(tmp_path: Path) -> None:
    images = write(tmp_path / "Imgs", "b.jpg", "a.jpeg", "c.png", "10.jpg", "9.jpg")
    masks = write(tmp_path / "GT", "c.png", "b.png", "a.png", "9.png", "10.jpg")
    assert names(pair(images, masks, "")) == [
        ("10.jpg", "10.jpg"), ("9.jpg", "9.png"), ("a.jpeg", "a.png"), ("b.jpg", "b.png"), ("c.png", "c.png"),
    ]  # fmt: skip


def test_upper_case_extensions_are_extensions(tmp_path: Path) -> None:
    images, masks = (
        write(tmp_path / "Imgs", "a.JPG", "b.Jpeg", "c.PNG"),
        write(tmp_path / "GT", "a.PNG", "b.png", "c.Png"),
    )
    assert names(pair(images, masks, "")) == [("a.JPG", "a.PNG"), ("b.Jpeg", "b.png"), ("c.PNG", "c.Png")]


def test_dots_and_hashes_belong_to_the_stem(tmp_path: Path) -> None:
    stem = "1#Accessories#1#Bag#24_8c3_o.v2"
    images, masks = write(tmp_path / "im", f"{stem}.jpg"), write(tmp_path / "gt", f"{stem}.png")
    assert names(pair(images, masks, "")) == [(f"{stem}.jpg", f"{stem}.png")]


def test_what_systems_leave_in_folders_is_skipped(tmp_path: Path) -> None:
    images, masks = (
        write(tmp_path / "Imgs", "a.jpg", "._a.jpg", "._b.jpg"),
        write(tmp_path / "GT", "a.png", "._a.png"),
    )
    for folder in (images, masks):
        for name in ("Thumbs.db", ".DS_Store", "readme.txt", "list.json"):
            (folder / name).write_text("x")
        (folder / "edges").mkdir()
    assert names(pair(images, masks, "")) == [("a.jpg", "a.png")]


def test_only_stems_that_contain_keep_take_part(tmp_path: Path) -> None:
    images = write(tmp_path / "Imgs", "COD10K-CAM-1.jpg", "COD10K-NonCAM-2.jpg", "COD10K-CAM-3.jpg")
    masks = write(tmp_path / "GT", "COD10K-CAM-1.png", "COD10K-NonCAM-9.png", "COD10K-CAM-3.png")
    assert names(pair(images, masks, "-CAM-")) == [
        ("COD10K-CAM-1.jpg", "COD10K-CAM-1.png"), ("COD10K-CAM-3.jpg", "COD10K-CAM-3.png"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"none named \*-BUG-\*"):
        pair(images, masks, "-BUG-")


# --- what stands alone


def test_images_without_masks_are_named_the_first_five_and_counted(tmp_path: Path) -> None:
    images, masks = write(tmp_path / "Imgs", *(f"{i}.jpg" for i in range(8))), write(tmp_path / "GT", "3.png")
    with pytest.raises(ValueError) as refusal:
        pair(images, masks, "")
    assert str(refusal.value).startswith(str(masks))
    assert str(refusal.value).endswith("none for 0, 1, 2, 4, 5 and 2 more")


def test_masks_without_images_are_named(tmp_path: Path) -> None:
    images, masks = write(tmp_path / "Imgs", "a.jpg"), write(tmp_path / "GT", "a.png", "z.png", "b.png")
    with pytest.raises(ValueError) as refusal:
        pair(images, masks, "")
    assert str(refusal.value).startswith(str(images))
    assert str(refusal.value).endswith("none for b, z")


def test_one_folder_of_truth_for_all_splits_is_read_by_the_images(tmp_path: Path) -> None:
    train, test = write(tmp_path / "Train", "a.jpg", "c.jpg"), write(tmp_path / "Test", "b.jpg")
    masks = write(tmp_path / "GT", "a.png", "b.png", "c.png")
    assert names(pair(train, masks, "", only_with_image=True)) == [("a.jpg", "a.png"), ("c.jpg", "c.png")]
    assert names(pair(test, masks, "", only_with_image=True)) == [("b.jpg", "b.png")]
    with pytest.raises(ValueError, match="none for b$"):
        pair(train, masks, "")


def test_an_image_without_a_mask_is_an_error_there_too(tmp_path: Path) -> None:
    images, masks = write(tmp_path / "Train", "a.jpg", "lost.jpg"), write(tmp_path / "GT", "a.png", "b.png")
    with pytest.raises(ValueError, match="none for lost"):
        pair(images, masks, "", only_with_image=True)


@pytest.mark.parametrize("missing", ["Imgs", "GT"])
def test_a_missing_folder_is_named_and_so_is_the_key_to_change(tmp_path: Path, missing: str) -> None:
    for folder in {"Imgs", "GT"} - {missing}:
        write(tmp_path / folder, "a.png")
    with pytest.raises(ValueError, match=rf"{missing} \(set data\.root, or"):
        pair(tmp_path / "Imgs", tmp_path / "GT", "")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    write(tmp_path, "Imgs")
    write(tmp_path / "GT", "a.png")
    with pytest.raises(ValueError, match="must be folders"):
        pair(tmp_path / "Imgs", tmp_path / "GT", "")


@pytest.mark.parametrize("only_with_image", [False, True])
def test_empty_folders_are_refused(tmp_path: Path, only_with_image: bool) -> None:
    images, masks = write(tmp_path / "Imgs"), write(tmp_path / "GT")
    with pytest.raises(ValueError, match="Imgs: must hold at least one image"):
        pair(images, masks, "", only_with_image)
    write(masks, "a.png")
    with pytest.raises(ValueError, match="Imgs"):
        pair(images, masks, "", only_with_image)


@pytest.mark.parametrize("twice", ["Imgs", "GT"])
def test_two_files_of_one_stem_are_refused_and_neither_is_dropped_in_silence(
    tmp_path: Path, twice: str
) -> None:
    images, masks = write(tmp_path / "Imgs", "a.jpg", "b.jpg"), write(tmp_path / "GT", "a.png", "b.png")
    write(tmp_path / twice, "b.jpeg")
    with pytest.raises(ValueError, match="b"):
        pair(images, masks, "")


# --- the dataset


def test_folder_pairs_stand_in_a_row_in_the_order_given(tmp_path: Path) -> None:
    for name, stems in (("COD10K", "ab"), ("CAMO", "cd")):
        write(tmp_path / name / "Imgs", *(f"{s}.jpg" for s in stems))
        write(tmp_path / name / "GT", *(f"{s}.png" for s in stems))
    write(tmp_path / "CAMO" / "GT", "of_another_split.png")
    dataset = ImageMaskFolders(
        str(tmp_path),
        [
            {"images": "CAMO/Imgs", "masks": "CAMO/GT", "only_with_image": True},
            {"images": "COD10K/Imgs", "masks": "COD10K/GT", "keep": "b"},
        ],
        side=None,
    )
    assert [dataset[i].id for i in range(len(dataset))] == ["CAMO/Imgs/c", "CAMO/Imgs/d", "COD10K/Imgs/b"]
    assert (dataset[0].mask == (VALUES > 0)).all()
    assert dataset[0].image.shape == (4, 6, 3)


def test_side_resizes_image_and_mask_together(tmp_path: Path) -> None:
    write(tmp_path / "i", "a.png"), write(tmp_path / "m", "a.png")
    sample = ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=2)[0]
    assert sample.image.shape == (2, 2, 3)
    # of columns 2..4 in rows 1 and 2, each new pixel of 2 x 3 holds 1/6 on the left and 2/6 on the right
    assert sample.mask.tolist() == [[False, False], [False, False]]
    assert sample.image[:, 1].mean() > sample.image[:, 0].mean()


def one_good_pair_and(tmp_path: Path) -> tuple[Path, Path]:
    """Write two pairs; return the image and the mask of the second."""
    write(tmp_path / "i", "a.png", "b.png")
    write(tmp_path / "m", "a.png", "b.png")
    return tmp_path / "i" / "b.png", tmp_path / "m" / "b.png"


@pytest.mark.parametrize("spoiled", [0, 1])
@pytest.mark.parametrize("content", [b"no image", b"", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_refused_by_name_before_training(
    tmp_path: Path, spoiled: int, content: bytes
) -> None:
    path = one_good_pair_and(tmp_path)[spoiled]
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=None)
    assert str(refusal.value).startswith(f"{path}: must be an image")


def test_a_mask_that_was_cut_off_is_refused_by_name_before_training(tmp_path: Path) -> None:
    _, mask = one_good_pair_and(tmp_path)
    mask.write_bytes(mask.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"m/b\.png.*cannot be decoded"):
        ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=None)


def test_damage_inside_a_mask_is_refused_by_name_when_it_is_read(tmp_path: Path) -> None:
    _, mask = one_good_pair_and(tmp_path)
    whole = mask.read_bytes()
    at = whole.index(b"IDAT") + 6
    mask.write_bytes(whole[:at] + b"\xff\xff\xff" + whole[at + 3 :])
    dataset = ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=None)
    assert dataset[0].id == "a"
    with pytest.raises(ValueError, match=r"m/b\.png.*cannot be decoded"):
        dataset[1]


def test_a_sound_mask_of_every_mode_is_accepted(tmp_path: Path) -> None:
    _, mask = one_good_pair_and(tmp_path)
    for mode in ("1", "L", "RGB", "RGBA"):
        Image.fromarray(VALUES).convert(mode).save(mask)
        dataset = ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=None)
        assert (dataset[1].mask == (VALUES > 0)).all()


def test_a_photograph_turned_by_its_camera_is_accepted_with_an_upright_mask(tmp_path: Path) -> None:
    image, _ = one_good_pair_and(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(VALUES.T.copy()).save(image, exif=exif.tobytes())
    assert ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=None)[1].image.shape == (
        4,
        6,
        3,
    )
    exif[0x0112] = 3  # upside down: still 4 wide
    Image.fromarray(VALUES.T.copy()).save(image, exif=exif.tobytes())
    with pytest.raises(ValueError, match=r"b\.png.*6x4.*4x6"):
        ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=None)


def test_a_mask_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "i", "a.png", values=np.zeros((5, 6), np.uint8)), write(tmp_path / "m", "a.png")
    with pytest.raises(ValueError, match=r"a\.png.*6x4.*6x5"):
        ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=8)[0]


# --- keys of a folder pair


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("resize_mask", True, r"folders\[0\]\.resize_mask: there is no such key.*resize_masks"),
        ("objects", "car", r"folders\[0\]\.objects: "),
        ("objects", [0.5], r"folders\[0\]\.objects\.0: "),
        ("keep", 3, r"folders\[0\]\.keep: "),
    ],
)
def test_a_key_that_is_wrong_is_named(tmp_path: Path, key: str, value: object, words: str) -> None:
    one_good_pair_and(tmp_path)
    with pytest.raises(ValueError, match=words):
        ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m", key: value}], side=None)


def test_objects_and_background_are_not_both_named(tmp_path: Path) -> None:
    one_good_pair_and(tmp_path)
    keys = {"images": "i", "masks": "m", "objects": [1], "background": [0]}
    with pytest.raises(ValueError, match=r"folders\[0\]\.background: must not be given beside objects"):
        ImageMaskFolders(str(tmp_path), [keys], side=None)


def test_masks_may_have_a_suffix_and_lie_beside_their_images(tmp_path: Path) -> None:
    write(tmp_path / "x", "a.png", "a_mask.png", "b.png", "b_mask.png")
    dataset = ImageMaskFolders(str(tmp_path), [{"images": "x", "masks": "x", "mask_suffix": "_mask"}], None)
    assert dataset.ids == ["a", "b"]
    assert dataset[1].path == tmp_path / "x" / "b.png" and (dataset[1].mask == (VALUES > 0)).all()
    (tmp_path / "x" / "b_mask.png").unlink()
    with pytest.raises(ValueError, match="none for b$"):
        ImageMaskFolders(str(tmp_path), [{"images": "x", "masks": "x", "mask_suffix": "_mask"}], None)


def test_a_survey_lists_what_the_constructor_refuses(tmp_path: Path) -> None:
    write(tmp_path / "i", "a.png", "b.png", "b.jpg", "alone.png"), write(tmp_path / "m", "a.png", "b.png")
    folders = [{"images": "i", "masks": "m"}, {"images": "nowhere", "masks": "m"}]
    found = ImageMaskFolders.survey(str(tmp_path), folders, None)
    assert [item.id for item in found.items] == ["i/a", "i/b"] and found.without_mask == ["alone"]
    assert ["b.jpg and b.png" in found.faults[0], "nowhere" in found.faults[1]] == [True, True]
    with pytest.raises(ValueError, match=r"b\.jpg and b\.png"):
        ImageMaskFolders(str(tmp_path), folders, None)


# --- real downloads


@pytest.mark.parametrize(("split", "count"), [("TR", 160), ("TE", 40)])
def test_duts_loads_as_downloaded(realdata: Path, split: str, count: int) -> None:
    folders = [{"images": f"DUTS-{split}/DUTS-{split}-Image", "masks": f"DUTS-{split}/DUTS-{split}-Mask"}]
    dataset = ImageMaskFolders(str(realdata / "DUTS"), folders, side=None)
    assert len(dataset) == count
    samples = [dataset[i] for i in range(count)]
    assert len({s.id for s in samples}) == count
    assert {s.mask.shape for s in samples} == {(321, 481), (481, 321)}
    assert all(s.image.shape[:2] == s.mask.shape for s in samples)
    shares = [s.mask.mean() for s in samples]
    assert 0.004 < min(shares) < max(shares) < 0.98  # 0.5 % to 97.5 %, says the collection's README
    assert np.mean([s.image.std() for s in samples]) > 30  # photographs, not blanks


DAVIS = {"bike_00000": "palette", "judo_00000": "palette", "judo_00005": "853x480", "judo_00008": "palette"}


@pytest.mark.parametrize("stem", DAVIS)
def test_davis_masks_are_refused_by_name_for_their_palette_or_size(realdata: Path, stem: str) -> None:
    folders = [{"images": "images", "masks": "masks", "keep": stem}]
    with pytest.raises(ValueError, match=rf"{stem}\.png.*{DAVIS[stem]}"):
        ImageMaskFolders(str(realdata / "davis_like"), folders, side=None)


def test_judo_00005_made_grey_is_still_one_pixel_too_narrow_and_its_neighbour_is_fit(
    realdata: Path, tmp_path: Path
) -> None:
    for stem in ("judo_00005", "judo_00008"):
        palette = np.asarray(Image.open(realdata / "davis_like" / "masks" / f"{stem}.png"))
        write(tmp_path / "masks", f"{stem}.png", values=(palette > 0).astype(np.uint8) * 255)
        write(tmp_path / "images")
        photograph = (realdata / "davis_like" / "images" / f"{stem}.jpg").read_bytes()
        (tmp_path / "images" / f"{stem}.jpg").write_bytes(photograph)
    folders = {"images": "images", "masks": "masks"}
    with pytest.raises(ValueError, match=r"judo_00005\.png.*853x480.*judo_00005\.jpg is 854x480"):
        ImageMaskFolders(str(tmp_path), [folders], side=None)
    fit = ImageMaskFolders(str(tmp_path), [{**folders, "keep": "00008"}], side=None)
    assert fit[0].mask.shape == (480, 854)
    assert 0.001 < fit[0].mask.mean() < 0.5


def test_davis_reads_right_once_it_is_said_what_is_background_and_that_masks_may_be_resized(
    realdata: Path,
) -> None:
    folders = {"images": "images", "masks": "masks", "background": [0], "resize_masks": True}
    dataset = ImageMaskFolders(str(realdata / "davis_like"), [folders], side=None)
    assert dataset.ids == ["bike_00000", "judo_00000", "judo_00005", "judo_00008", "judo_00013"]
    areas = [int(dataset[i].mask.sum()) for i in range(5)]
    assert {dataset[i].mask.shape for i in range(5)} == {(480, 854)}
    assert [areas[i] for i in (0, 1, 3, 4)] == [6466 + 7971, 53811, 7986, 9489]
    assert abs(areas[2] - 6034) < 60  # of a mask 853 wide


def test_the_road_is_refused_by_its_values_and_its_cars_are_read(realdata: Path) -> None:
    folders = {"images": "misc_pairs", "masks": "misc_pairs", "mask_suffix": "_mask"}
    with pytest.raises(ValueError, match=r"road_mask\.png.*80, 160, 240"):
        ImageMaskFolders(str(realdata), [folders], side=None)[0]
    assert int(ImageMaskFolders(str(realdata), [{**folders, "objects": [240]}], None)[0].mask.sum()) == 2400
