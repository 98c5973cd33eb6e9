"""Damaged files of every reader are read or refused, in bounded time and memory.

A refusal is one ValueError that names the file.
"""

from __future__ import annotations

import json
import pickle
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import coco, photograph, polygon, reason, ref, truth
from PIL import Image

from segrl.data.chat_traces import ChatTraces
from segrl.data.check import look
from segrl.data.image_mask import ImageMaskFolders
from segrl.data.jsonl import JsonlDataset
from segrl.data.reasoning import ReasonSeg
from segrl.data.referring import ReferringExpressions
from segrl.data.survey import Survey
from segrl.data.transforms import read_map, read_mask
from segrl.prompts.tags import SegR1Tags
from segrl.segmenter import Segmenter

FEW, ALL = 20, 200
SECONDS, BYTES = 2.0, 2**30
FORMS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "webp": "WEBP"}
PHOTO = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change some bytes, cut off the end, insert or remove bytes, or double a run of them."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, max(1, len(data))))
        count = int(rng.integers(1, 9))
        match int(rng.integers(0, 6)):
            case 0:
                for place in rng.integers(0, max(1, len(data)), count):
                    if data:
                        data[place] ^= 1 << int(rng.integers(0, 8))
            case 1:
                data[at : at + count] = rng.integers(0, 256, count, dtype=np.uint8).tobytes()
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.integers(0, 256, count, dtype=np.uint8).tobytes()
            case 4:
                del data[at : at + count]
            case 5:
                data[at:at] = data[at : at + 40]
    return bytes(data)


def stored(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.fromarray(pixels).save(path, FORMS[path.suffix[1:]], exif=exif.tobytes(), **options)
    return path


def mask_of(mode: str) -> np.ndarray:
    """Return a mask with 24 of 384 pixels set, in 8 bits, 16 bits or colour."""
    grey = np.zeros((16, 24), np.uint8)
    grey[4:8, 6:12] = 255
    return {"L": grey, "I": grey.astype(np.uint16) * 257, "RGB": np.stack([grey] * 3, -1)}[mode]


Case = tuple[Path, Callable[[], object]]


def through(survey: Callable[[], Survey], dataset: Callable[[], object]) -> Callable[[], None]:
    """Check reports on every item, whatever its files hold; the loader reads all, or refuses."""

    def read() -> None:
        for item in survey().items:
            look(item)
        samples = dataset()
        for index in range(len(samples)):
            sample = samples[index]
            assert sample.image.shape[:2] == sample.mask.shape
            assert sample.image.dtype == np.uint8 and sample.mask.dtype == bool

    return read


def folders(home: Path, form: str, which: str, mode: str = "L") -> Case:
    image, mask = home / "i" / f"a.{form}", home / "m" / f"a.{form}"
    if which == "image":
        stored(image, PHOTO), truth(mask.with_suffix(".png"))
    else:
        (
            photograph(image.with_suffix(".png")),
            stored(mask, mask_of(mode), **({"lossless": True} if form == "webp" else {})),
        )
    keys = (str(home), [{"images": "i", "masks": "m"}], None)
    target = image if which == "image" else mask
    return target, through(lambda: ImageMaskFolders.survey(*keys), lambda: ImageMaskFolders(*keys))


def lists(home: Path) -> Case:
    photograph(home / "a.png"), truth(home / "m.png")
    lines = [
        {"image": "a.png", "mask": "m.png", "query": "the \u00e9t\u00e9", "id": f"n{i}"} for i in range(3)
    ]
    target = home / "list.jsonl"
    target.write_text("\n".join(map(json.dumps, lines)))
    keys = (str(target), None, None)
    return target, through(lambda: JsonlDataset.survey(*keys), lambda: JsonlDataset(*keys))


def traces(home: Path) -> Case:
    photograph(home / "a.png")
    solution = "<bbox>[1,1,9,9]</bbox> <points>[[4,4]]</points> <labels>[1]</labels>"
    line = {
        "image": "a.png",
        "problem": "?",
        "thinking": "<think>It is (4, 4).</think>",
        "solution": solution,
    }
    target = home / "traces.jsonl"
    target.write_text("\n".join([json.dumps(line)] * 2))
    keys = (str(target), SegR1Tags(16, 64), None)
    return target, through(lambda: ChatTraces.survey(*keys), lambda: ChatTraces(*keys))


def refer(home: Path, target: str, name: str = "refs(unc).p") -> Case:
    ann = [11, 12] if name.endswith(".json") else 12
    coco(home, "images", "r", name, [ref(1, "val", ann, ("left", "top")), ref(2, "val", 11, ("x",))])
    keys = (str(home / "r"), str(home / "images"), name, "val", None, 0, None)
    read = through(lambda: ReferringExpressions.survey(*keys), lambda: ReferringExpressions(*keys))
    return home / "r" / target, read


def many_refs(home: Path) -> Case:
    """Write so many refs that indices of the pickle's table take four bytes."""
    target, read = refer(home, "refs(unc).p")
    refs = [ref(number, "val", 11, (f"the {number}.",)) for number in range(60)]
    target.write_bytes(pickle.dumps(refs, protocol=2))
    return target, read


def reasons(home: Path, target: str) -> Case:
    shapes = [polygon("target", (1, 1), (12, 1), (12, 9)), polygon("ignore", (3, 3), (5, 3), (5, 5))]
    reason(home / "val", "a", ["what is \u00e9?"], shapes)
    keys = (str(home), "val", False, None)
    return home / "val" / target, through(lambda: ReasonSeg.survey(*keys), lambda: ReasonSeg(*keys))


def maps(home: Path, form: str, mode: str) -> Case:
    target = stored(home / f"p.{form}", mask_of(mode))

    def read() -> None:
        try:
            assert read_map(target).dtype == np.uint8
        except ValueError as refusal:
            named(refusal, target)
        assert read_mask(target).dtype == bool

    return target, read


class Seen(Exception):
    """Raised when the pixels reach the policy."""


def asked(home: Path, form: str) -> Case:
    """Run `Segmenter.segment` up to the policy, by file and by PIL image."""

    def encode(messages: object, image: np.ndarray) -> None:
        assert image.dtype == np.uint8 and image.shape[2] == 3
        raise Seen

    policy = SimpleNamespace(encoder=SimpleNamespace(encode=encode))
    segmenter = Segmenter(policy=policy, grammar=SegR1Tags(16, 64), engine=None, head=None)
    target = stored(home / f"a.{form}", PHOTO)

    def read() -> None:
        with pytest.raises(Seen):
            segmenter.segment(target)
        with Image.open(target) as image, pytest.raises(Seen):
            segmenter.segment(image)

    return target, read


READERS: dict[str, Callable[[Path], Case]] = {
    **{f"image.{form}": lambda home, form=form: folders(home, form, "image") for form in FORMS},
    **{f"mask.{form}": lambda home, form=form: folders(home, form, "mask") for form in FORMS},
    "mask16.png": lambda home: folders(home, "png", "mask", "I"),
    "mask16.tif": lambda home: folders(home, "tif", "mask", "I"),
    "mask_rgb.png": lambda home: folders(home, "png", "mask", "RGB"),
    "list": lists, "traces": traces,
    "refs": lambda home: refer(home, "refs(unc).p"), "many_refs": many_refs,
    "grefs": lambda home: refer(home, "grefs(unc).json", "grefs(unc).json"),
    "instances": lambda home: refer(home, "instances.json"),
    "reason.json": lambda home: reasons(home, "a.json"), "reason.jpg": lambda home: reasons(home, "a.jpg"),
    "score.png": lambda home: maps(home, "png", "L"), "score.jpg": lambda home: maps(home, "jpg", "RGB"),
    "segmenter.jpg": lambda home: asked(home, "jpg"), "segmenter.png": lambda home: asked(home, "png"),
}  # fmt: skip


def named(refusal: ValueError, target: Path) -> None:
    """Check that the line names the damaged file, or one that it names."""
    line = str(refusal)
    beside = {target.name, target.stem, *(path.name for path in target.parent.iterdir())}
    assert "\n" not in line and any(name in line for name in beside), line


def survives(home: Path, name: str, first: int, count: int) -> int:
    """Apply mutations `first` to `first + count` to a reader's file; return how many could be read."""
    target, read = READERS[name](home)
    whole, could = target.read_bytes(), 0
    read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        content = mutated(whole, np.random.default_rng([number, len(whole)]))
        target.write_bytes(content)
        began = time.process_time()
        try:
            read()
            could += 1
        except ValueError as refusal:
            named(refusal, target)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {name}: {error!r}") from error
        assert time.process_time() - began < SECONDS, f"mutation {number} of {name}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BYTES, f"{name}: {grown >> 20} MiB"
    return could


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    assert survives(tmp_path, name, 0, FEW) < FEW, "some damage must be seen, or nothing is tried here"


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_two_hundred_damaged_files_are_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    assert survives(tmp_path, name, FEW, ALL - FEW) < ALL
