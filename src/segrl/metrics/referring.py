"""Referring and reasoning segmentation: gIoU and cIoU, with the conventions that tables of this field mix, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from segrl.metrics.functional.overlap import intersection_union
from segrl.metrics.parts import Parts
from segrl.metrics.saliency import ratio

_PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


class Referring:
    """`giou` mean IoU per sample (mIoU), `ciou` all intersections over all unions (oIoU), `p@.5` to `p@.9` shares of at least that IoU.

    Args:
        empty: IoU of a sample whose truth and mask are both empty: "one" (LISA, gRefCOCO), "zero" (Seg-R1), or "skip": it
            counts neither in `giou` nor in `p@`. A mask that is empty by a fault is IoU 0 in all three.
        ignore: pixels that the annotators left open: "exclude" (LISA), "background" (Seg-R1) or "target" (Seg-Zero).
        no_target: also `n_acc` (share of samples without a target that got an empty mask, and not by a fault) and `t_acc` (with a target, a mask);
            `p@` is then of the samples with a target, as in ReLA's code.

    Raises:
        ValueError: if a convention has another name.
    """

    def __init__(
        self, empty: Literal["one", "zero", "skip"], ignore: Literal["exclude", "background", "target"], no_target: bool
    ) -> None:  # fmt: skip
        if empty not in ("one", "zero", "skip"):
            raise ValueError(f"scores.empty: one, zero or skip is needed; got {empty}")
        if ignore not in ("exclude", "background", "target"):
            raise ValueError(f"scores.ignore: exclude, background or target is needed; got {ignore}")
        self.empty, self.ignore, self.no_target = empty, ignore, no_target

    @property
    def convention(self) -> str:
        """What a reader of its numbers has to know, in one line."""
        return f"truth and mask empty: {self.empty}; ignored pixels: {self.ignore}; a fault is an empty mask, and IoU 0"

    @property
    def knows_ignored(self) -> bool:
        """Yes, by `ignore`."""
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """See `Family`."""
        absent = ("n_acc", "t_acc") if self.no_target else ()
        return ("giou", "ciou", *map(_name, _PRECISIONS), *absent)

    def parts(
        self, saliency: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None, faulty: bool = False
    ) -> Parts:
        """See `Family`."""
        mask = saliency >= 128
        if ignore is not None and self.ignore == "target":
            truth = truth | ignore
        both, either = intersection_union(mask, truth, ignore if self.ignore == "exclude" else None)
        counted = float(either > 0 or self.empty != "skip" or faulty)
        overlap = both / either if either else float(self.empty == "one" and not faulty)
        found = {"counted": counted, "iou": overlap * counted, "intersection": both, "union": either}
        target, drawn = bool(truth.any()), bool(mask.any())
        found |= {"target": target, "target_drawn": target and drawn}
        found |= {"absent": not target, "absent_left": not target and not drawn and not faulty}
        found |= {_name(p): float(overlap >= p) * found[self._among] for p in _PRECISIONS}
        return {name: np.array([value], np.float64) for name, value in found.items()}

    @property
    def _among(self) -> str:
        """Which samples `p@` is a share of."""
        return "target" if self.no_target else "counted"

    def summary(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Family`."""
        value = {name: mean[..., 0] for name, mean in means.items()}
        table = {
            "giou": ratio(value["iou"], value["counted"]),
            "ciou": ratio(value["intersection"], value["union"]),
            **{_name(p): ratio(value[_name(p)], value[self._among]) for p in _PRECISIONS},
        }
        if self.no_target:
            table["n_acc"] = ratio(value["absent_left"], value["absent"])
            table["t_acc"] = ratio(value["target_drawn"], value["target"])
        return table


def _name(threshold: float) -> str:
    """Such as `p@.5`."""
    return f"p@{threshold:.1f}".replace("0.", ".")
