"""The RefCOCO family as downloaded: a refs file, `instances.json`, and COCO's images.

RefCOCO, RefCOCO+ and RefCOCOg have `refs(<split_by>).p`, one object per ref; gRefCOCO has `grefs(unc).json`, any number, or none.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from segrl.data.transforms import read_image, squash
from segrl.types import Sample

_NOTHING = -1  # gRefCOCO's mark of a sentence that names no object


class _Plain(pickle.Unpickler):
    """Lists, dicts, strings and numbers; anything that would call code is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401 - the base's signature
        """Never."""
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The refs in a Python 2 pickle or a JSON file; raises ValueError naming one that is missing, damaged, or not plain data."""
    if not path.is_file():
        raise ValueError(f"data: a refs file is needed; there is no {path} (set data.root)")
    try:
        if path.suffix == ".json":
            refs = json.loads(path.read_text())
        else:
            refs = _Plain(BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: a file of plain data is needed; it cannot be read ({error})") from None
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and "sentences" in ref for ref in refs):
        raise ValueError(f"{path}: a list of refs with sentences is needed; the file holds something else")
    return refs


def read_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:  # noqa: ANN401 - COCO's own union
    """COCO polygons or run lengths to bool `[height, width]`: the union, even where polygons overlap."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        encoded = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = mask.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    return np.ascontiguousarray(mask.decode(encoded)).astype(bool)


class ReferringExpressions(Dataset[Sample]):
    """One sample per sentence of a split.

    Args:
        annotations: folder with the refs file and `instances.json`.
        images: folder of COCO's train2014.
        refs: file name, such as `refs(umd).p`.
        split: "train", "val", "test", "testA", "testB".
        count: so many objects drawn at random, one sentence each; none takes every sentence of every object.
        seed: of that draw.
        side: resize to this square, image and mask together; none leaves them as they are.

    Raises:
        ValueError: if a file is missing or is not what it should be, or the split is empty or too small.
    """

    def __init__(
        self, annotations: str, images: str, refs: str, split: str, count: int | None, seed: int, side: int | None
    ) -> None:  # fmt: skip
        refs_path = Path(annotations) / refs
        chosen = [ref for ref in read_refs(refs_path) if ref["split"] == split]
        if not chosen or (count is not None and count > len(chosen)):
            raise ValueError(
                f"{refs_path}: {count or 'some'} objects of the split {split} are needed; it has {len(chosen)}"
            )
        instances = Path(annotations) / "instances.json"
        if not instances.is_file() or not Path(images).is_dir():
            missing = images if instances.is_file() else instances
            raise ValueError(
                f"data: annotations and images are needed; there is no {missing} (set data.root)"
            )
        coco = json.loads(instances.read_text())
        self.objects = {a["id"]: a for a in coco["annotations"]}
        self.pictures = {i["id"]: i for i in coco["images"]}
        self.images, self.side = Path(images), side
        self.rows = self._drawn(chosen, count, seed)

    @staticmethod
    def _drawn(
        refs: Sequence[dict[str, Any]], count: int | None, seed: int
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Refs and their sentences."""
        if count is None:
            return [(ref, sentence) for ref in refs for sentence in ref["sentences"]]
        rng = np.random.default_rng(seed)
        chosen = [refs[i] for i in rng.permutation(len(refs))[:count]]
        return [(ref, ref["sentences"][int(rng.integers(len(ref["sentences"])))]) for ref in chosen]

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.rows)

    @property
    def ids(self) -> list[str]:
        """Of all samples, in order: ref and sentence."""
        return [f"{ref['ref_id']}-{sentence['sent_id']}" for ref, sentence in self.rows]

    def __getitem__(self, index: int) -> Sample:
        """Read one: the image is found by its id, for the file name in a ref is not one of COCO's."""
        ref, sentence = self.rows[index]
        picture = self.pictures[ref["image_id"]]
        path, size = self.images / picture["file_name"], (picture["height"], picture["width"])
        named = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        objects = [read_segmentation(self.objects[i]["segmentation"], *size) for i in named if i != _NOTHING]
        mask = np.logical_or.reduce(objects) if objects else np.zeros(size, bool)
        image = read_image(path, mask.shape)
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"{path}: an image of {picture['width']}x{picture['height']} is needed; it is {image.shape[1]}x{image.shape[0]}"
            )
        sample = Sample(
            id=f"{ref['ref_id']}-{sentence['sent_id']}", image=image, mask=mask, query=str(sentence["sent"]).strip(), path=path,
            objects=np.stack(objects) if objects else np.zeros((0, *size), bool),
        )  # fmt: skip
        return sample if self.side is None else squash(sample, self.side)
