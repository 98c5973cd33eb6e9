"""Read the RefCOCO family as downloaded: a refs file, `instances.json`, and COCO's images.

RefCOCO, RefCOCO+ and RefCOCOg have `refs(<split_by>).p`, with one object per ref. gRefCOCO has
`grefs(unc).json`, with any number of objects per ref, also 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np

from segrl.data.annotations import read_instances, read_refs, read_segmentation
from segrl.data.boundary import found_at, is_file, reading, reason
from segrl.data.survey import Item, ItemDataset, Survey
from segrl.data.transforms import read_image
from segrl.types import Sample

_NOTHING = -1  # gRefCOCO's annotation id of a sentence that names no object


def belongs(ref_split: str, split: str) -> bool:
    """Return whether a ref is in a split, as in the refer API.

    Google's `testAB` is in testA and in testB; the split `test` contains every name that begins with "test".
    """
    if split in ("testA", "testB", "testC"):
        return ref_split.startswith("test") and split[-1] in ref_split[4:]
    return ref_split.startswith("test") if split == "test" else ref_split == split


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """The refs of one split, and all objects and images of `instances.json`."""

    path: Path
    """The refs file."""
    refs: list[dict[str, Any]]
    """Refs of the split with at least one sentence; gRefCOCO's owners say to skip the others."""
    objects: dict[int, dict[str, Any]]
    """COCO's annotations by id."""
    pictures: dict[int, dict[str, Any]]
    """COCO's image entries by id."""
    images: Path
    """Folder of the images."""

    @classmethod
    def read(cls, annotations: str, images: str, refs: str, split: str) -> Annotations:
        """Read the files. Raise ValueError, naming the file, if one is missing or malformed."""
        path, instances = Path(annotations) / refs, Path(annotations) / "instances.json"
        chosen = [ref for ref in read_refs(path) if belongs(ref["split"], split) and ref["sentences"]]
        if not is_file(instances) or not Path(images).is_dir():
            missing = images if is_file(instances) else instances
            raise ValueError(
                f"data: annotations and images must exist; there is no {missing} "
                "(set data.root, or the root of the test set)"
            )
        objects, pictures = read_instances(instances)
        return cls(path=path, refs=chosen, objects=objects, pictures=pictures, images=Path(images))

    def named(self, ref: dict[str, Any]) -> list[int]:
        """Return the ids of the objects that a ref names; empty if it names no object."""
        ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        return [one for one in ids if one != _NOTHING]

    def faults(self) -> list[str]:
        """Return a message for each image or object that a ref names and `instances.json` lacks."""
        lost = []
        for ref in self.refs:
            absent = [f"image {ref['image_id']}"] * (ref["image_id"] not in self.pictures)
            absent += [f"object {one}" for one in self.named(ref) if one not in self.objects]
            lost += [
                f"{self.path}: ref {ref['ref_id']}: {what} must be in instances.json; it is not there"
                for what in absent
            ]
        return lost

    def image(self, ref: dict[str, Any]) -> tuple[Path, tuple[int, int]]:
        """Return file, height and width by the image's id; the file name in a ref is not COCO's."""
        picture = self.pictures[ref["image_id"]]
        return found_at(self.images / picture["file_name"]), (picture["height"], picture["width"])

    def sample(self, ref: dict[str, Any], sentence: dict[str, Any]) -> Sample:
        """Read the image of a sentence and draw the objects that it names.

        The query is the sentence stripped and in lower case, as in LISA and works that follow it.

        Raises:
            ValueError: if the image is unfit or of another size, or an object cannot be drawn.
        """
        path, size = self.image(ref)
        image = read_image(path, size)
        if image.shape[:2] != size:
            raise ValueError(
                f"{path}: must be an image of {size[1]}x{size[0]}; it is {image.shape[1]}x{image.shape[0]}"
            )
        objects = [self._drawn(ref, one, size) for one in self.named(ref)]
        mask = np.logical_or.reduce(objects) if objects else np.zeros(size, bool)
        return Sample(
            id=name_of(ref, sentence),
            image=image,
            mask=mask,
            query=str(sentence["sent"]).strip().lower(),
            path=path,
            objects=np.stack(objects) if objects else np.zeros((0, *size), bool),
            cluster=f"image {ref['image_id']}",
        )

    def _drawn(self, ref: dict[str, Any], one: int, size: tuple[int, int]) -> np.ndarray:
        """Return an object's mask. Raise ValueError, naming file, ref and object, if it cannot be drawn."""
        where = f"{self.path.parent / 'instances.json'}: object {one} of ref {ref['ref_id']}: segmentation"
        with reading(where, "must be COCO's polygons or run lengths"):
            try:
                return read_segmentation(self.objects[one].get("segmentation"), *size)
            except ValueError as error:
                raise ValueError(f"{where}: {reason(error)}") from None


def name_of(ref: dict[str, Any], sentence: dict[str, Any]) -> str:
    """Return a sample's id, made of the ids of ref and sentence."""
    return f"{ref['ref_id']}-{sentence['sent_id']}"


class Exclusion(TypedDict):
    """Splits of a refs file whose images are excluded."""

    refs: str
    """Path of the refs file."""
    splits: Sequence[str]


def _images_of(exclude: Sequence[Exclusion]) -> set[int]:
    """Return the ids of the images of all refs in the excluded splits."""
    return {
        ref["image_id"]
        for one in exclude
        for ref in read_refs(Path(one["refs"]))
        if any(belongs(ref["split"], split) for split in one["splits"])
    }


def _drawn(
    refs: Sequence[dict[str, Any]], count: int | None, seed: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (ref, sentence) pairs: all of them, or one for each of `count` random refs."""
    if count is None:
        return [(ref, sentence) for ref in refs for sentence in ref["sentences"]]
    rng = np.random.default_rng(seed)
    chosen = [refs[i] for i in rng.permutation(len(refs))[:count]]
    return [(ref, ref["sentences"][int(rng.integers(len(ref["sentences"])))]) for ref in chosen]


class ReferringExpressions(ItemDataset):
    """A dataset of one sample per sentence of a split.

    Args:
        annotations: folder with the refs file and `instances.json`.
        images: folder of COCO's train2014 images.
        refs: name of the refs file, such as `refs(umd).p`.
        split: "train", "val", "test", "testA", "testB" or "testC".
        count: number of refs drawn at random, with one random sentence each; None takes every sentence.
        seed: seed of that draw.
        side: image and mask are resized to a square of this side; None keeps their size.
        exclude: refs files and splits whose images are left out, so that test images are not trained on
            (some training images of RefCOCOg are test images of RefCOCO).

    Raises:
        ValueError: if a file is missing or malformed, a ref names an unknown image or object, or the split
            has no refs or fewer than `count`. On access: if an image is unfit or an object cannot be drawn.
    """

    whole_split: ClassVar[Mapping[str, object]] = {"count": None, "exclude": ()}

    def __init__(
        self,
        annotations: str,
        images: str,
        refs: str,
        split: str,
        count: int | None,
        seed: int,
        side: int | None,
        exclude: Sequence[Exclusion] = (),
    ) -> None:
        survey = self.survey(annotations, images, refs, split, count, seed, side, exclude)
        super().__init__(survey, side)

    @classmethod
    def survey(
        cls,
        annotations: str,
        images: str,
        refs: str,
        split: str,
        count: int | None,
        seed: int,
        side: int | None,
        exclude: Sequence[Exclusion] = (),
    ) -> Survey:
        """List the sentences of the draw and all faults of the split; `side` is ignored."""
        try:
            of, taken = Annotations.read(annotations, images, refs, split), _images_of(exclude)
        except ValueError as error:
            return Survey(faults=[str(error)])
        chosen = [ref for ref in of.refs if ref["image_id"] not in taken]
        few = f"{of.path}: the split {split} must have at least {count or 1} objects; it has {len(chosen)}"
        found = Survey(faults=[few] * (len(chosen) < (count or 1)) + of.faults())
        lost: set[str] = set()
        for ref, sentence in _drawn(chosen, count, seed):
            if ref["image_id"] not in of.pictures or not set(of.named(ref)) <= set(of.objects):
                continue
            path, (height, width) = of.image(ref)
            if path.name in lost or not is_file(path):
                lost.add(path.name)
                continue
            name, read = name_of(ref, sentence), partial(of.sample, ref, sentence)
            found.items.append(Item(id=name, image=path, size=(width, height), read=read))
        found.without_image = sorted(lost)
        return found.close(image=f"{images}: must hold an image for every object", empty=few)
