"""Little downloads in the layouts of the real ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from segrl.data.image_mask import ImageMaskFolders

WIDTH, HEIGHT = 24, 16


def photograph(path: Path, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Write a noise image, whatever the case of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG" if path.suffix.lower() == ".png" else "JPEG")
    return path


def truth(path: Path, value: int = 255, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Return a mask whose rows 4 to 7 and columns 6 to 11 are the object: 24 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[4:8, 6:12] = value
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG")
    return path


def litter(folder: Path) -> None:
    """Write the files that systems and archives leave behind."""
    for name in ("Thumbs.db", ".DS_Store", "._left.jpg", "._left.png", "readme.txt"):
        (folder / name).write_bytes(b"\x00")


def folders(
    root: Path,
    images: str,
    masks: str,
    stems: tuple[str, ...],
    image_ext: str = ".jpg",
    mask_ext: str = ".png",
) -> None:
    """Write pairs of image and mask, the last of them with extensions in upper case."""
    for number, stem in enumerate(stems):
        last = number == len(stems) - 1
        photograph(root / images / (stem + (image_ext.upper() if last else image_ext)), number)
        truth(root / masks / (stem + (mask_ext.upper() if last else mask_ext)))
    litter(root / images)
    litter(root / masks)


def coco(root: Path, images: str, annotations: str, refs_name: str, refs: list[dict[str, object]]) -> None:
    """Write a refer download: pictures 1 and 2, and objects 11, 12 and 21.

    Object 11 is the left half, 12 the top half in run lengths, and 21 belongs to picture 2.
    """
    for number in (1, 2):
        photograph(root / images / f"COCO_train2014_{number:012d}.jpg", number)
    left = [[0, 0, 12, 0, 12, 16, 0, 16]]
    top = {"counts": [0] + [8, 8] * 24, "size": [16, 24]}
    folder = root / annotations
    folder.mkdir(parents=True, exist_ok=True)
    instances = {
        "images": [
            {"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "width": WIDTH, "height": HEIGHT}
            for n in (1, 2)
        ],
        "annotations": [
            {"id": 11, "image_id": 1, "segmentation": left},
            {"id": 12, "image_id": 1, "segmentation": top},
            {"id": 21, "image_id": 2, "segmentation": left},
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    path = folder / refs_name
    path.write_bytes(json.dumps(refs).encode() if path.suffix == ".json" else pickle.dumps(refs, protocol=2))


def ref(
    number: int, split: str, ann_id: object, sentences: tuple[str, ...], image: int = 1
) -> dict[str, object]:
    """Return one ref; its file name is not one of COCO's."""
    return {
        "ref_id": number, "ann_id": ann_id, "image_id": image, "split": split, "category_id": 1,
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "sent_ids": [number * 10 + i for i in range(len(sentences))],
        "sentences": [{"sent_id": number * 10 + i, "sent": s, "raw": s,
                       "tokens": s.split()} for i, s in enumerate(sentences)],
    }  # fmt: skip


def polygon(label: str, *points: tuple[float, float]) -> dict[str, object]:
    """Return one shape of a ReasonSeg file, with the keys of the real ones."""
    return {
        "label": label, "labels": [label], "shape_type": "polygon", "image_name": "x.jpg",
        "points": [list(p) for p in points], "group_id": None, "group_ids": [None], "flags": {},
    }  # fmt: skip


def reason(
    folder: Path,
    stem: str,
    texts: list[str],
    shapes: list[dict[str, object]],
    encoding: str = "utf-8",
    ext: str = ".jpg",
) -> None:
    """Write a photograph and its JSON."""
    photograph(folder / f"{stem}{ext}")
    content = json.dumps({"text": texts, "is_sentence": True, "shapes": shapes}, ensure_ascii=False)
    (folder / f"{stem}.json").write_bytes(content.encode(encoding))


def pair(
    images: Path, masks: Path, keep: str, only_with_image: bool = False, mask_suffix: str = ""
) -> list[tuple[Path, Path]]:
    """The files that a folder pair lists, or the ValueError that refuses it."""
    keys = {"keep": keep, "only_with_image": only_with_image, "mask_suffix": mask_suffix}
    found = ImageMaskFolders.survey("/", [{"images": str(images), "masks": str(masks), **keys}], None)
    found.refuse_faults()
    return [(item.image, item.mask) for item in found.items]
