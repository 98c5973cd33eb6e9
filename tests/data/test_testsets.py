"""Every test set of the literature is composed and read, from a little download of its layout."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from segrl.runs.configuration import conf_folder, register_resolvers

HASH = "1#Accessories#1#Bag#24_8c3_o"
# the images' folder, the masks', stems, extension of images
FOLDERS = {
    "cod10k": ("Test/Image", "Test/GT_Object",
               ("COD10K-CAM-1-Aquatic-3-Crab-32", "COD10K-CAM-2-Terrestrial-23-Cat-1506"), ".jpg"),
    "camo": ("Images/Test", "GT", ("camourflage_00012", "camourflage_00013"), ".jpg"),
    "nc4k": ("Imgs", "GT", ("1", "2"), ".jpg"),
    "chameleon": ("Imgs", "GT", ("animal-1", "animal-2"), ".jpg"),
    "duts_te": ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask",
                ("ILSVRC2012_test_00000003", "sun_aaaenaoynzhoyheo"), ".jpg"),
    "dut_omron": ("DUT-OMRON-image", "pixelwiseGT-new-PNG", ("im005", "sun_aaax"), ".jpg"),
    "hku_is": ("imgs", "gt", ("0004", "0005"), ".png"),
    "ecssd": ("images", "ground_truth_mask", ("0001", "0002"), ".jpg"),
    "pascal_s": ("datasets/imgs/pascal", "datasets/masks/pascal", ("1", "2"), ".jpg"),
    "dis_vd": ("DIS-VD/im", "DIS-VD/gt", (HASH, f"{HASH}.v2"), ".jpg"),
    "dis_te1": ("DIS-TE1/im", "DIS-TE1/gt", (HASH, "b"), ".jpg"),
    "dis_te2": ("DIS-TE2/im", "DIS-TE2/gt", (HASH, "b"), ".jpg"),
    "dis_te3": ("DIS-TE3/im", "DIS-TE3/gt", (HASH, "b"), ".jpg"),
    "dis_te4": ("DIS-TE4/im", "DIS-TE4/gt", (HASH, "b"), ".jpg"),
}  # fmt: skip
# folder, refs file, split
REFER = {
    "refcoco_val": ("refcoco", "refs(unc).p", "val"), "refcoco_testa": ("refcoco", "refs(unc).p", "testA"),
    "refcoco_testb": ("refcoco", "refs(unc).p", "testB"), "refcocop_val": ("refcoco+", "refs(unc).p", "val"),
    "refcocop_testa": ("refcoco+", "refs(unc).p", "testA"),
    "refcocop_testb": ("refcoco+", "refs(unc).p", "testB"),
    "refcocog_val": ("refcocog", "refs(umd).p", "val"), "refcocog_test": ("refcocog", "refs(umd).p", "test"),
    "grefcoco_val": ("grefcoco", "grefs(unc).json", "val"),
    "grefcoco_testa": ("grefcoco", "grefs(unc).json", "testA"),
    "grefcoco_testb": ("grefcoco", "grefs(unc).json", "testB"),
}  # fmt: skip
REASON = {"reasonseg_val": "val", "reasonseg_test": "test"}
COUNTS = {
    "cod10k": 2026, "camo": 250, "nc4k": 4121, "chameleon": 76, "duts_te": 5019, "dut_omron": 5168,
    "hku_is": 4447, "ecssd": 1000, "pascal_s": 850, "dis_vd": 470, "dis_te1": 500, "dis_te2": 500,
    "dis_te3": 500, "dis_te4": 500, "refcoco_val": 10834, "refcoco_testa": 5657, "refcoco_testb": 5095,
    "refcocop_val": 10758, "refcocop_testa": 5726, "refcocop_testb": 4889, "refcocog_val": 4896,
    "refcocog_test": 9602, "reasonseg_val": 200, "reasonseg_test": 779, "grefcoco_val": None,
    "grefcoco_testa": None, "grefcoco_testb": None,
}  # fmt: skip


def composed(name: str, root: Path, *overrides: str) -> DictConfig:
    """Return the node of one test set, as an evaluation composes it."""
    register_resolvers()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", [f"+testset={name}", f"testsets.{name}.root={root}", *overrides])
    return cfg.testsets[name]


def test_every_test_set_has_a_layout_here_a_licence_and_a_source() -> None:
    names = {path.stem for path in (conf_folder() / "testset").glob("[!_]*.yaml")}
    assert names == set(FOLDERS) | set(REFER) | set(REASON) == set(COUNTS)
    for name in names:
        one = composed(name, Path("x"))
        assert one.published == COUNTS[name], name
        assert one.licence and one.source.startswith("http"), name


def test_several_compose_together() -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", ["+testset=[cod10k,camo]", "testsets.camo.root=a", "testsets.cod10k.root=b"])
    assert (cfg.testsets.camo.samples.root, cfg.testsets.cod10k.samples.root) == ("a", "b")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_set_of_folders_reads_as_it_is_downloaded(tmp_path: Path, name: str) -> None:
    images, masks, stems, ext = FOLDERS[name]
    layouts.folders(tmp_path, images, masks, stems, ext)
    if name == "cod10k":  # images without an object lie beside, with black masks
        layouts.folders(tmp_path, images, masks, ("COD10K-NonCAM-1-Aquatic-1-x-9",), ext)
    if name == "camo":  # all ground truth lies in one folder
        layouts.truth(tmp_path / masks / "camourflage_00001.png")
    before = sorted(tmp_path.rglob("*"))
    samples = instantiate(composed(name, tmp_path).samples)
    assert samples.ids == sorted(stems)
    for place in range(len(samples)):
        sample = samples[place]
        assert (sample.id, sample.mask.shape) == (sorted(stems)[place], (layouts.HEIGHT, layouts.WIDTH))
        assert sample.mask.sum() == 24 and sample.mask[4:8, 6:12].all() and sample.ignore is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["cod10k", "camo", "chameleon"])
def test_the_bundle_of_sinet_is_read_by_three_overrides(tmp_path: Path, name: str) -> None:
    layouts.folders(tmp_path / "TestDataset" / name, "Imgs", "GT", ("COD10K-CAM-1", "COD10K-CAM-2"))
    where = (f"testsets.{name}.images=Imgs", f"testsets.{name}.masks=GT")
    assert len(instantiate(composed(name, tmp_path / "TestDataset" / name, *where).samples)) == 2


@pytest.mark.parametrize("name", REFER)
def test_a_set_of_the_refcoco_family_reads_as_it_is_downloaded(tmp_path: Path, name: str) -> None:
    folder, refs_name, split = REFER[name]
    many = folder == "grefcoco"
    refs = [
        layouts.ref(1, split, [11, 12] if many else 11, (" The Left One ", "left")),
        layouts.ref(2, "train", [12] if many else 12, ("not of this split",)),
        layouts.ref(3, split, [-1] if many else 21, ("nothing here" if many else "left again",), image=2),
        layouts.ref(4, split, [11] if many else 11, ()),
    ]
    layouts.coco(tmp_path, "images/mscoco/images/train2014", folder, refs_name, refs)
    samples = instantiate(composed(name, tmp_path).samples)
    assert samples.ids == ["1-10", "1-11", "3-30"]
    first, _, last = (samples[i] for i in range(3))
    assert first.query == "the left one"
    assert first.mask.sum() == (12 * 16 + 12 * 8 if many else 12 * 16)
    assert len(first.objects) == (2 if many else 1)
    assert last.mask.sum() == (0 if many else 12 * 16)


@pytest.mark.parametrize("name", REASON)
def test_reasonseg_reads_as_it_is_downloaded(tmp_path: Path, name: str) -> None:
    folder = tmp_path / REASON[name]
    square = ((2.9, 2.9), (9.9, 2.9), (9.9, 9.9), (2.9, 9.9))
    layouts.reason(
        folder, "a#b", ["Which one?", "A paraphrase."], [layouts.polygon("target", *square)], ext=".JPG"
    )
    layouts.litter(folder)
    samples = instantiate(composed(name, tmp_path).samples)
    assert (samples.ids, samples[0].query) == (["a#b"], "Which one?")
    assert samples[0].mask.sum() == 8 * 8
