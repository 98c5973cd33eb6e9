"""Files as they occur in the world: read correctly, or refused in one line that names the file."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from layouts import pair, photograph, truth
from PIL import Image, ImageMode, PngImagePlugin

from segrl.data import pictures
from segrl.data.image_mask import ImageMaskFolders, pair_maps
from segrl.data.jsonl import JsonlDataset
from segrl.data.transforms import MaskRule, read_image, read_map, read_mask, read_pair

OBJECT = np.zeros((12, 16), bool)
OBJECT[2:8, 3:13] = True
GREY = OBJECT.astype(np.uint8) * 255
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def refused(read, path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        read(path)
    assert path.name in str(refusal.value) and "\n" not in str(refusal.value)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


# --- metadata


def heavy() -> dict[str, dict[str, object]]:
    """Return PNG metadata larger than Pillow reads."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "node" * 500_000, zip=True)
    late = PngImagePlugin.PngInfo()
    late.add_text("late", "node" * 500_000, zip=True)
    return {"icc": {"icc_profile": bytes(2_000_000)}, "text": {"pnginfo": text}, "ztxt": {"pnginfo": late}}


@pytest.mark.parametrize("kind", ["icc", "text", "ztxt"])
def test_a_png_with_megabytes_of_metadata_is_its_pixels(tmp_path: Path, kind: str) -> None:
    image = save(tmp_path / "i" / "a.png", Image.fromarray(PHOTO), **heavy()[kind])
    mask = save(tmp_path / "m" / "a.png", Image.fromarray(GREY), **heavy()[kind])
    assert (read_image(image) == PHOTO).all() and (read_mask(mask) == OBJECT).all()
    assert pictures.header(image).shown == (16, 12)
    found = ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], None)
    assert (found[0].image == PHOTO).all()


def test_metadata_behind_the_pixels_may_be_large_too(tmp_path: Path) -> None:
    before = save(tmp_path / "before.png", Image.fromarray(PHOTO), **heavy()["text"]).read_bytes()
    plain = save(tmp_path / "plain.png", Image.fromarray(PHOTO)).read_bytes()
    at = before.index(b"iTXt") - 4
    chunk = before[at : at + 12 + int.from_bytes(before[at : at + 4])]
    path = tmp_path / "behind.png"
    path.write_bytes(plain[:-12] + chunk + plain[-12:])
    assert (read_image(path) == PHOTO).all()


BROKEN = [
    b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
    b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12", b"no exif at all",
    b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("exif", BROKEN)
def test_broken_exif_turns_nothing(tmp_path: Path, exif: bytes, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", Image.fromarray(PHOTO), exif=exif)
    assert read_image(path, upright=True).shape == (12, 16, 3) and pictures.header(path).shown == (16, 12)


def oriented(value: object, kind: int) -> bytes:
    """Return EXIF data whose orientation has a wrong TIFF type."""
    stored = {
        2: str(value).encode() + b"\x00",
        7: bytes([int(value) % 256]),
        3: int(value).to_bytes(2, "little"),
        4: int(value).to_bytes(4, "little"),
    }[kind]
    count = len(stored) if kind in (2, 7) else 1
    entry = (
        (0x0112).to_bytes(2, "little")
        + kind.to_bytes(2, "little")
        + count.to_bytes(4, "little")
        + stored.ljust(4, b"\x00")
    )
    return b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00" + entry + bytes(4)


@pytest.mark.parametrize(("kind", "turns"), [(3, True), (4, True), (2, False), (7, False)])
def test_an_orientation_of_another_type_is_a_number_or_nothing_everywhere(
    tmp_path: Path, kind: int, turns: bool
) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(PHOTO), exif=oriented(6, kind))
    assert pictures.header(path).shown == ((12, 16) if turns else (16, 12))
    assert read_image(path, upright=True).shape == ((16, 12, 3) if turns else (12, 16, 3))
    truth(tmp_path / "m.png", size=(12, 16) if turns else (16, 12))
    assert read_pair(path, tmp_path / "m.png").image.shape[:2] == ((16, 12) if turns else (12, 16))


@pytest.mark.parametrize("turn", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 300])
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path: Path, turn: int) -> None:
    from PIL import ImageOps

    path = save(tmp_path / "a.png", Image.fromarray(PHOTO), exif=oriented(turn, 3))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert (read_image(path, upright=True) == expected).all()
    assert pictures.header(path).shown == expected.shape[1::-1]


def test_a_mask_that_is_stored_turned_means_what_it_shows(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", Image.fromarray(GREY), exif=oriented(3, 3))
    assert (read_mask(path) == OBJECT[::-1, ::-1]).all() and (read_map(path) == GREY[::-1, ::-1]).all()


def test_a_turned_tiff_is_turned_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(PHOTO), tiffinfo={0x0112: 6})
    assert (read_image(path, upright=True) == np.rot90(PHOTO, -1)).all()
    assert pictures.header(path).shown == (12, 16)


# --- modes


def test_every_mode_of_pillow_is_read_or_refused_by_name() -> None:
    modes = [
        *ImageMode.getmode("L").__class__.__mro__[:0], *Image.MODES,
        "I;16", "I;16L", "I;16B", "La", "RGBa", "PA", "RGBX", "HSV", "LAB",
    ]  # fmt: skip
    for mode in dict.fromkeys(modes):
        image = Image.new(mode, (5, 4))
        for read in (
            pictures.in_rgb,
            lambda where, i: __import__("segrl.data.transforms", fromlist=["_values"])._values(where, i),
        ):
            try:
                assert read(Path("a.xyz"), image).shape[:2] == (4, 5), mode
            except ValueError as refusal:
                assert str(refusal).startswith("a.xyz: ") and mode in str(refusal), mode


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_a_mode_without_a_reading_is_refused_by_its_name(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "a.tif", Image.new(mode, (5, 4)))
    for read in (read_image, read_mask, read_map):
        refused(read, path, rf"\b{mode}\b")


def inks(black: bool) -> Image.Image:
    """Return the mask in cyan, magenta and yellow, or in black ink alone."""
    if not black:
        return Image.fromarray(np.kron(GREY, np.ones((4, 4), np.uint8))).convert("RGB").convert("CMYK")
    ink = np.zeros((48, 64, 4), np.uint8)
    ink[..., 3] = 255 - np.kron(GREY, np.ones((4, 4), np.uint8))
    return Image.fromarray(ink, "CMYK")


@pytest.mark.parametrize("black", [False, True])
@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_a_mask_of_inks_means_what_it_shows(tmp_path: Path, black: bool, suffix: str) -> None:
    options = {"quality": 95} if suffix == ".jpg" else {}
    path = save(tmp_path / f"m{suffix}", inks(black), **options)
    expected = np.kron(OBJECT, np.ones((4, 4), bool))
    assert (read_mask(path) == expected).mean() > 0.99
    assert ((read_map(path) > 128) == expected).mean() > 0.99
    assert (read_image(path)[..., 0] > 128).astype(bool)[expected].mean() > 0.99


def test_inks_that_show_colours_or_do_not_say_what_0_means_are_refused(tmp_path: Path) -> None:
    big = Image.fromarray(np.kron(PHOTO, np.ones((4, 4, 1), np.uint8)))
    refused(read_mask, save(tmp_path / "m.jpg", big.convert("CMYK")), "colours")
    path = save(tmp_path / "n.jpg", inks(True))
    content = path.read_bytes()
    at = content.index(b"\xff\xee")
    path.write_bytes(content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4]) :])
    refused(read_mask, path, "Adobe")
    refused(read_image, path, "Adobe")


# --- sixteen bits


def test_sixteen_grey_bits_are_one_picture_as_a_file_and_in_pillows_hands(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 96).astype(np.uint16), (8, 1))
    for name, values in (("wide", ramp * 257), ("narrow", ramp)):
        for suffix in (".png", ".tif"):
            path = save(tmp_path / f"{name}{suffix}", Image.fromarray(values))
            assert (read_image(path)[..., 1] == ramp).all()
            with Image.open(path) as image:
                assert (pictures.in_rgb(path, pictures.loaded(path, image)) == read_image(path)).all()


def test_sixteen_bits_of_colour_that_hold_values_of_eight_are_refused_and_others_are_their_upper_eight(
    tmp_path: Path,
) -> None:
    import cv2

    for name, factor in (("wide", 257), ("narrow", 1)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), PHOTO[..., ::-1].astype(np.uint16) * factor)
        masks = np.stack([GREY.astype(np.uint16) * factor] * 3, -1)
        cv2.imwrite(str(tmp_path / f"mask_{name}.png"), masks)
    assert (read_image(tmp_path / "wide.png") == PHOTO).all()
    assert (read_mask(tmp_path / "mask_wide.png") == OBJECT).all()
    refused(read_image, tmp_path / "narrow.png", "16 bits a channel")
    refused(read_mask, tmp_path / "mask_narrow.png", "16 bits a channel")


def test_grey_beyond_sixteen_bits_is_refused_with_its_range(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([[0, 70_000]], np.int32)))
    for read in (read_image, read_mask, read_map):
        refused(read, path, "0 to 70000")
    assert read_mask(path, MaskRule(objects=(70_000,))).tolist() == [[False, True]]


# --- transparency, palettes, several pictures


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("colour", [0, 255])
def test_a_mask_that_is_only_in_its_transparency_is_refused_and_not_read_as_one_value(
    tmp_path: Path, mode: str, colour: int
) -> None:
    image = Image.new(mode, (16, 12), (colour,) * (len(mode) - 1) + (0,))
    image.putalpha(Image.fromarray(GREY))
    path = save(tmp_path / "m.png", image)
    refused(read_mask, path, "transparency")
    refused(read_map, path, "transparency")
    image.putalpha(255)
    assert read_mask(save(path, image)).all() == bool(colour)


def test_a_palette_of_one_shade_twice_is_refused(tmp_path: Path) -> None:
    image = Image.fromarray(OBJECT.astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 255, 255, 255])
    refused(read_mask, save(tmp_path / "m.png", image, transparency=b"\x00\xff"), "palette")


def test_a_palette_photograph_with_transparency_shows_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(OBJECT.astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    path = save(tmp_path / "i.png", image, transparency=b"\x00\xff")
    assert (read_image(path) == np.where(OBJECT[..., None], [200, 100, 50], [10, 20, 30])).all()


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_a_file_of_several_pictures_is_refused_by_its_format(tmp_path: Path, form: str) -> None:
    frames = [Image.fromarray(np.roll(PHOTO, shift, 1)) for shift in range(3)]
    path = tmp_path / "a.png"
    with path.open("w+b") as file:  # a TIFF's writer also reads
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
    for read in (read_image, read_mask, read_map):
        refused(read, path, f"must hold one picture; this {form} file holds several")


def test_a_phones_photograph_with_previews_is_the_photograph(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    big = Image.fromarray(np.kron(PHOTO, np.ones((8, 8, 1), np.uint8)))
    with path.open("wb") as file:
        big.save(file, "MPO", save_all=True, append_images=[big.resize((16, 12))])
    assert Image.open(path).format == "MPO" and read_image(path).shape == (96, 128, 3)


def test_a_format_that_would_call_a_program_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        Image.fromarray(PHOTO).save(file, "EPS")
    refused(read_image, path, "cannot be decoded")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_a_picture_of_one_pixel_or_one_line_is_a_sample(tmp_path: Path, size: tuple[int, int]) -> None:
    photograph(tmp_path / "i" / "a.png", size=size)
    save(tmp_path / "m" / "a.png", Image.new("L", size, 255))
    found = ImageMaskFolders(str(tmp_path), [{"images": "i", "masks": "m"}], side=8)
    assert found[0].mask.all() and found[0].image.shape == (8, 8, 3)


# --- names


@pytest.mark.parametrize("name", ["été", "1e3", "2014", "true", "a=b?[c]~ 'd' \"e\"", "图像 ü"])
def test_names_pair_whatever_form_their_letters_have(tmp_path: Path, name: str) -> None:
    root = tmp_path / f"{name} x"
    photograph(root / "i" / f"{unicodedata.normalize('NFC', name)}.png", size=(16, 12))
    save(root / "m" / f"{unicodedata.normalize('NFD', name)}.png", Image.fromarray(GREY))
    found = ImageMaskFolders(str(root), [{"images": "i", "masks": "m"}], None)
    assert (found[0].mask == OBJECT).all()
    assert len(pair_maps(root / "m", root / "m", "")) == 1
    line = f'{{"image": "i/{unicodedata.normalize("NFD", name)}.png", "mask": "m/{name}.png"}}'.replace(
        "'", "'"
    )
    if '"e"' not in name:
        (root / "l.jsonl").write_text(line)
        assert len(JsonlDataset(str(root / "l.jsonl"), None, None)) == 1


def test_one_name_in_two_forms_is_two_files_of_one_name(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        photograph(tmp_path / "i" / f"{unicodedata.normalize(form, 'é')}.png", size=(16, 12))
    save(tmp_path / "m" / "é.png", Image.fromarray(GREY))
    with pytest.raises(ValueError, match="names must be unique"):
        pair(tmp_path / "i", tmp_path / "m", "")


def test_a_name_that_is_no_text_is_refused_in_letters_that_can_be_printed(tmp_path: Path) -> None:
    photograph(tmp_path / "i" / "a.png"), truth(tmp_path / "m" / "a.png")
    (tmp_path / "i" / "caf\udce9.png").write_bytes((tmp_path / "i" / "a.png").read_bytes())
    with pytest.raises(ValueError, match=r"names must be UTF-8; got 'caf\\udce9\.png'"):
        pair(tmp_path / "i", tmp_path / "m", "")


def test_files_with_other_suffixes_are_read_or_named(tmp_path: Path) -> None:
    for number, suffix in enumerate((".webp", ".tif", ".JPG", ".TIFF")):
        path = tmp_path / "i" / f"{number}{suffix}"
        save(path.with_suffix(path.suffix.lower()), Image.fromarray(PHOTO)).rename(path)
        save(tmp_path / "m" / f"{number}.tif", Image.fromarray(GREY))
    assert len(pair(tmp_path / "i", tmp_path / "m", "")) == 4


def test_what_a_folder_holds_and_nobody_reads_is_counted_and_said(tmp_path: Path) -> None:
    photograph(tmp_path / "i" / "a.png"), (tmp_path / "m" / "test").mkdir(parents=True)
    for name in ("a.gif", "b.gif", "c.npy", ".hidden.png", "README"):
        (tmp_path / "m" / name).write_bytes(b"x")
    said = r"\(not read: 2 \.gif, 1 \.npy, 1 hidden, 1 no suffix, 1 sub folders\)"
    with pytest.raises(ValueError) as refusal:
        pair(tmp_path / "i", tmp_path / "m", "")
    for words in ("2 .gif", "1 .npy", "1 hidden", "1 sub folders", "1 no suffix"):
        assert words in str(refusal.value), said
    found = ImageMaskFolders.survey(str(tmp_path), [{"images": "i", "masks": "m"}], None)
    assert found.unread == {".gif": 2, ".npy": 1, "hidden": 1, "sub folders": 1, "no suffix": 1}


def test_maps_one_folder_deeper_are_pointed_to(tmp_path: Path) -> None:
    truth(tmp_path / "gt" / "a.png"), truth(tmp_path / "masks" / "test" / "a.png")
    with pytest.raises(
        ValueError, match=r"none for a; sub folders are not read: did you mean pred=.*masks/test\?"
    ):
        pair_maps(tmp_path / "masks", tmp_path / "gt", "")


def test_bytes_are_read_as_files_are(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(PHOTO).save(data, "PNG", exif=oriented(6, 3))
    assert (read_image(Path("shard"), content=data.getvalue(), upright=True) == np.rot90(PHOTO, -1)).all()
