from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segrl.data.pictures import header
from segrl.data.transforms import (
    MaskRule,
    mask_kind,
    read_image,
    read_map,
    read_mask,
    read_pair,
    squash,
)
from segrl.types import Sample

OBJECT = np.zeros((6, 8), bool)
OBJECT[1:3, 2:7] = True


def save(path: Path, values: np.ndarray, mode: str | None = None, **options: object) -> Path:
    """Write an array in its own mode, or converted to `mode`."""
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def grey(low: int, high: int, dtype: type = np.uint8) -> np.ndarray:
    return np.where(OBJECT, high, low).astype(dtype)


def coloured(seed: int = 0, shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def is_object(mask: np.ndarray) -> bool:
    return mask.dtype == bool and mask.shape == OBJECT.shape and bool((mask == OBJECT).all())


# --- masks that are read


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 1), (128, 129), (0, 129), (100, 200)])
def test_a_grey_mask_is_its_pixels_above_128_or_its_ones(tmp_path: Path, low: int, high: int) -> None:
    assert is_object(read_mask(save(tmp_path / "m.png", grey(low, high))))


def test_a_soft_edge_is_cut_strictly_above_128(tmp_path: Path) -> None:
    mask = read_mask(save(tmp_path / "m.png", np.array([[0, 127, 128, 129, 255]], np.uint8)))
    assert mask.tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize(("value", "object_"), [(0, False), (255, True)])
def test_a_mask_of_one_value_is_all_or_nothing(tmp_path: Path, value: int, object_: bool) -> None:
    mask = read_mask(save(tmp_path / "m.png", np.full((3, 4), value, np.uint8)))
    assert mask.tolist() == [[object_] * 4] * 3


def test_a_one_bit_mask_is_as_it_is(tmp_path: Path) -> None:
    assert is_object(read_mask(save(tmp_path / "m.png", grey(0, 255), "1")))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_colour_mask_whose_channels_agree_is_grey(tmp_path: Path, mode: str) -> None:
    assert is_object(read_mask(save(tmp_path / "m.png", grey(0, 255), mode)))


def test_transparency_says_nothing_about_the_object(tmp_path: Path) -> None:
    rgba = np.repeat(grey(0, 255)[..., None], 4, 2)
    rgba[..., 3] = grey(255, 0)
    assert is_object(read_mask(save(tmp_path / "m.png", rgba)))


def test_a_16_bit_mask_is_scaled_to_8(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", grey(0, 65535, np.uint16))
    assert Image.open(path).mode == "I;16"
    assert is_object(read_mask(path))
    assert is_object(read_mask(save(tmp_path / "m.png", grey(128 * 257, 129 * 257, np.uint16))))


@pytest.mark.parametrize("high", [1, 255])
def test_a_16_bit_mask_that_holds_8_bit_values_is_not_read_as_empty(tmp_path: Path, high: int) -> None:
    path = save(tmp_path / "m.png", grey(0, high, np.uint16))
    try:
        mask = read_mask(path)
    except ValueError as refusal:
        assert str(path) in str(refusal)
    else:
        assert is_object(mask)


def test_a_grey_mask_of_instance_numbers_is_refused_and_not_read_as_empty(tmp_path: Path) -> None:
    numbers = grey(0, 2)
    numbers[1, 2] = 3
    path = save(tmp_path / "m.png", numbers)  # two objects, all below 128
    with pytest.raises(ValueError, match=r"m\.png"):
        read_mask(path)


@pytest.mark.parametrize("high", [2, 64, 128])
def test_a_grey_mask_that_never_reaches_above_128_is_refused_with_its_largest_value(
    tmp_path: Path, high: int
) -> None:
    with pytest.raises(ValueError, match=rf"m\.png.*\b{high}\b"):
        read_mask(save(tmp_path / "m.png", grey(0, high)))


def test_a_jpeg_mask_is_read(tmp_path: Path) -> None:
    big = np.kron(grey(0, 255), np.ones((16, 16), np.uint8))
    mask = read_mask(save(tmp_path / "m.jpg", big))
    assert (mask != (big > 128)).mean() < 0.02


# --- masks that are refused


def test_a_palette_mask_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "instances.png"
    image = Image.fromarray(grey(0, 1), "P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(path)
    assert Image.open(path).mode == "P"
    with pytest.raises(ValueError, match=r"instances\.png.*palette"):
        read_mask(path)


def palette(path: Path, indices: np.ndarray, colours: list[int]) -> Path:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(colours)
    image.save(path)
    return path


LABELS = np.arange(48, dtype=np.uint8).reshape(6, 8) % 4  # 0 to 3, twelve pixels each
COLOURS = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (MaskRule(objects=(2,)), [2]),
        (MaskRule(objects=(1, 3)), [1, 3]),
        (MaskRule(background=(0,)), [1, 2, 3]),
        (MaskRule(background=(0, 3)), [1, 2]),
        (MaskRule(objects=()), []),
        (MaskRule(objects=(9,)), []),
    ],
)
@pytest.mark.parametrize("stored", ["palette", "grey"])
def test_a_rule_says_which_values_are_the_object(
    tmp_path: Path, rule: MaskRule, found: list[int], stored: str
) -> None:
    path = tmp_path / "m.png"
    palette(path, LABELS, COLOURS) if stored == "palette" else save(path, LABELS)
    mask = read_mask(path, rule)
    assert mask.dtype == bool and (mask == np.isin(LABELS, found)).all()


def test_a_rule_beats_what_a_grey_mask_says_by_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", grey(200, 90))
    assert is_object(read_mask(path, MaskRule(objects=(90,))))
    assert is_object(~read_mask(path))


def test_a_palette_of_greys_is_what_it_shows_and_not_its_indices(tmp_path: Path) -> None:
    shown = [255, 255, 255, 0, 0, 0, 90, 90, 90]
    assert (read_mask(palette(tmp_path / "m.png", LABELS % 3, shown)) == (LABELS % 3 == 0)).all()


@pytest.mark.parametrize("colours", [COLOURS, [0, 0, 0, 255, 255, 254], [7, 7, 7]])
def test_a_palette_of_colours_or_of_one_shade_is_refused_with_the_way_out(
    tmp_path: Path, colours: list[int]
) -> None:
    indices = LABELS % (len(colours) // 3)
    with pytest.raises(ValueError, match=r"m\.png.*palette.*objects=\[INDEX,\.\.\.\] or background=\[0\]"):
        read_mask(palette(tmp_path / "m.png", indices, colours))


def test_labels_in_grey_without_any_dark_pixel_are_refused_by_their_values(tmp_path: Path) -> None:
    values = np.choose(LABELS % 3, [80, 160, 240]).astype(np.uint8)
    with pytest.raises(ValueError, match=r"m\.png.*80, 160, 240.*objects=\[VALUE"):
        read_mask(save(tmp_path / "m.png", values))
    assert read_mask(save(tmp_path / "m.png", np.maximum(values, 130))).all(), "a full mask with soft values"


def test_votes_of_subjects_are_above_half_or_not(tmp_path: Path) -> None:
    votes = np.array([[0, 42, 127, 128, 129, 170, 255]], np.uint8)
    assert read_mask(save(tmp_path / "m.png", votes)).tolist() == [[False] * 4 + [True] * 3]


@pytest.mark.parametrize("name", ["road", "judo_00005", "judo_00008", "bike_00000"])
def test_real_labels_are_refused_by_name_and_read_by_a_rule(realdata: Path, name: str) -> None:
    path = realdata / ("misc_pairs/road_mask.png" if name == "road" else f"davis_like/masks/{name}.png")
    rule, area = {
        "road": (MaskRule(objects=(240,)), 2400), "judo_00005": (MaskRule(background=(0,)), 6034),
        "judo_00008": (MaskRule(objects=(3,)), 7986), "bike_00000": (MaskRule(background=(0,)), 6466 + 7971),
    }[name]  # fmt: skip
    with pytest.raises(ValueError, match=path.name):
        read_mask(path)
    assert int(read_mask(path, rule).sum()) == area


def test_a_16_bit_mask_is_named_as_such(tmp_path: Path) -> None:
    assert mask_kind(save(tmp_path / "m.png", grey(0, 65535, np.uint16))) == "16 bit, 0/65535"
    assert mask_kind(save(tmp_path / "m.png", grey(0, 1, np.uint16))) == "16 bit, 0/1"
    assert mask_kind(save(tmp_path / "m.png", grey(7, 255))) == "graded"


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_mask_whose_channels_differ_is_refused_by_name(tmp_path: Path, mode: str) -> None:
    values = np.repeat(grey(0, 255)[..., None], 3, 2)
    values[0, 0, 1] = 7  # one pixel is enough
    with pytest.raises(ValueError, match=rf"red\.png.*{mode}.*channels differ"):
        read_mask(save(tmp_path / "red.png", values, mode))


def refused(path: Path, read: object) -> str:
    with pytest.raises(ValueError) as refusal:
        read(path)
    assert str(path) in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("read", [read_mask, read_image])
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, read: object) -> None:
    path = tmp_path / "page.png"
    path.write_text("<html>404</html>")
    assert "cannot be decoded" in refused(path, read)
    path.write_bytes(b"")
    assert "cannot be decoded" in refused(path, read)
    assert "no such file" in refused(tmp_path / "gone.png", read)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.bmp"])
@pytest.mark.parametrize("read", [read_mask, read_image])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_file_that_was_cut_off_is_refused_by_name(
    tmp_path: Path, name: str, read: object, share: float
) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (40, 50), dtype=np.uint8) * 255
    path = save(tmp_path / name, noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "cannot be decoded" in refused(path, read)


def test_damaged_bytes_raise_nothing_but_a_refusal_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = save(tmp_path / "damaged.png", rng.integers(0, 2, (12, 12), dtype=np.uint8) * 255)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
        try:
            read_mask(path)
        except ValueError as refusal:
            assert str(path) in str(refusal)


@pytest.mark.parametrize("read", [read_mask, read_image])
def test_an_image_too_large_for_pillow_is_refused_by_name(
    tmp_path: Path, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "poster.png", np.zeros((50, 50), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow raises above twice as many
    refused(path, read)


# --- photographs


def test_a_photograph_is_read_in_rgb_order(tmp_path: Path) -> None:
    values = coloured()
    assert (read_image(save(tmp_path / "i.png", values)) == values).all()


def test_a_grey_photograph_becomes_three_equal_channels(tmp_path: Path) -> None:
    values = coloured()[..., 0]
    assert (read_image(save(tmp_path / "i.png", values)) == values[..., None]).all()


def test_a_palette_photograph_shows_its_colours_and_not_its_indices(tmp_path: Path) -> None:
    image = Image.fromarray(grey(0, 1), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "i.png")
    expected = np.where(OBJECT[..., None], [200, 100, 50], [10, 20, 30])
    assert (read_image(tmp_path / "i.png") == expected).all()


def test_a_16_bit_photograph_is_scaled_and_not_blown_out(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = save(tmp_path / "i.png", ramp)
    try:
        image = read_image(path)
    except ValueError as refusal:
        assert str(path) in str(refusal)
    else:
        np.testing.assert_allclose(image[..., 0], ramp / 257, atol=1.5)


def sideways(path: Path, values: np.ndarray, orientation: int = 6) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, values, exif=exif.tobytes())


def test_the_cameras_rotation_is_applied_only_if_that_gives_the_masks_size(tmp_path: Path) -> None:
    values = coloured(shape=(6, 8))
    path = sideways(tmp_path / "i.png", values)
    upright = np.rot90(values, -1)
    assert (read_image(path, (8, 6)) == upright).all()
    assert (read_image(path, (6, 8)) == values).all()
    assert (read_image(path, (5, 5)) == values).all()
    assert (read_image(path) == values).all()


def test_the_size_shown_is_the_upright_one(tmp_path: Path) -> None:
    assert header(sideways(tmp_path / "i.png", coloured(shape=(6, 8)))).shown == (6, 8)
    assert header(sideways(tmp_path / "i.png", coloured(shape=(6, 8)), 3)).shown == (8, 6)
    assert header(save(tmp_path / "i.png", coloured(shape=(6, 8)))).shown == (8, 6)


# --- pairs


def test_a_pair_is_a_sample_named_by_its_stem(tmp_path: Path) -> None:
    values = coloured()
    sample = read_pair(
        save(tmp_path / "fish.01.png", values), save(tmp_path / "m.png", grey(0, 255)), query="the fish"
    )
    assert (sample.id, sample.query) == ("fish.01", "the fish")
    assert (sample.image == values).all()
    assert is_object(sample.mask)


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    image = save(tmp_path / "photo.png", coloured(shape=(6, 9)))
    with pytest.raises(ValueError, match=r"truth\.png.*8x6.*photo\.png.*9x6"):
        read_pair(image, save(tmp_path / "truth.png", grey(0, 255)))


def test_a_mask_within_one_percent_of_its_images_shape_is_resized_where_the_rule_says_so(
    tmp_path: Path,
) -> None:
    image = save(tmp_path / "photo.png", coloured(shape=(200, 400)))
    values = np.zeros((200, 399), np.uint8)
    values[:, 200:] = 255
    path = save(tmp_path / "truth.png", values)
    with pytest.raises(ValueError, match=r"truth\.png.*399x200.*400x200 \(resize_masks=true"):
        read_pair(image, path)
    sample = read_pair(image, path, rule=MaskRule(resize=True))
    assert sample.mask.shape == sample.image.shape[:2] == (200, 400)
    assert not sample.mask[:, :200].any() and sample.mask[:, 201:].all()


@pytest.mark.parametrize(("width", "fits"), [(397, True), (396, False), (403, True), (405, False)])
def test_one_percent_is_the_limit(tmp_path: Path, width: int, fits: bool) -> None:
    image = save(tmp_path / "photo.png", coloured(shape=(200, 400)))
    path = save(tmp_path / "truth.png", np.full((200, width), 255, np.uint8))
    if fits:
        assert read_pair(image, path, rule=MaskRule(resize=True)).mask.all()
    else:
        with pytest.raises(ValueError, match="must be of its image's size") as refusal:
            read_pair(image, path, rule=MaskRule(resize=True))
        assert "resize_masks" not in str(refusal.value)


def test_a_mask_of_half_the_size_has_the_same_shape(tmp_path: Path) -> None:
    image = save(tmp_path / "photo.png", coloured(shape=(12, 16)))
    sample = read_pair(image, save(tmp_path / "truth.png", grey(0, 255)), rule=MaskRule(resize=True))
    assert (sample.mask == np.kron(OBJECT, np.ones((2, 2), bool))).all()


def test_a_transposed_mask_is_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "photo.png", coloured(shape=(8, 6)))
    with pytest.raises(ValueError, match="8x6.*6x8"):
        read_pair(image, save(tmp_path / "truth.png", grey(0, 255)))


def test_a_rotated_photograph_meets_a_mask_drawn_upright(tmp_path: Path) -> None:
    image = sideways(tmp_path / "photo.png", coloured(shape=(8, 6)))
    sample = read_pair(image, save(tmp_path / "truth.png", grey(0, 255)))
    assert sample.image.shape == (6, 8, 3)


# --- squash


def test_squash_keeps_the_object_where_the_image_shows_it() -> None:
    image, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), bool)
    mask[10:30, 12:48] = True
    image[mask] = 255
    out = squash(Sample(id="a", image=image, mask=mask, query="q"), 20)
    assert (out.id, out.query) == ("a", "q")
    assert np.argwhere(out.mask).min(0).tolist() == [5, 4]
    assert np.argwhere(out.mask).max(0).tolist() == [14, 15]
    assert out.mask.sum() == 10 * 12
    assert ((out.image[..., 0] > 128) == out.mask).all()


def test_squash_gives_a_pixel_to_the_object_that_holds_more_than_half_of_it() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0, :] = True  # half of the upper two pixels
    mask[1, 0] = True  # three quarters of the first
    out = squash(Sample(id="a", image=np.zeros((4, 4, 3), np.uint8), mask=mask), 2)
    assert out.mask[0, 0]
    assert not out.mask[1].any()


def test_squash_leaves_a_sample_of_its_size_as_it_is() -> None:
    sample = Sample(id="a", image=coloured(shape=(8, 8)), mask=np.eye(8, dtype=bool))
    assert squash(sample, 8) is sample


def test_squash_keeps_the_share_of_the_object() -> None:
    y, x = np.mgrid[:200, :300]
    mask = np.hypot(y - 90, x - 160) < 60
    out = squash(Sample(id="a", image=np.zeros((200, 300, 3), np.uint8), mask=mask), 56)
    assert out.mask.mean() == pytest.approx(mask.mean(), rel=0.02)


def test_a_one_bit_mask_has_bytes_of_zero_and_one(tmp_path):
    Image.new("1", (4, 3), 1).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask.dtype == bool and mask.all() and (mask.view(np.uint8) == 1).all()
    assert (read_map(tmp_path / "mask.png") == 255).all()
