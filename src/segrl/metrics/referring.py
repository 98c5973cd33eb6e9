"""Scores of referring and reasoning segmentation: gIoU and cIoU.

Published tables use different conventions for empty masks and ignored pixels; here each has a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from segrl.metrics.functional.overlap import intersection_union
from segrl.metrics.parts import Parts
from segrl.metrics.saliency import ratio

_PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


class Referring:
    """Family of scores with IoU per sample and per set.

    `giou`: mean IoU of the samples (mIoU). `ciou`: all intersections over all unions (oIoU). `p@.5` to
    `p@.9`: shares of samples with at least that IoU.

    Args:
        empty: IoU of a sample whose truth and mask are both empty: "one" (LISA, gRefCOCO), "zero" (Seg-R1),
            or "skip": the sample counts neither in `giou` nor in `p@`. The empty mask of a fault has IoU 0 in
            all three.
        ignore: use of the pixels that annotators left open: "exclude" (LISA), "background" (Seg-R1) or
            "target" (Seg-Zero).
        no_target: whether to add `n_acc` and `t_acc`. `n_acc` is the share of samples without a target whose
            mask is empty and not of a fault; `t_acc` is the share of samples with a target whose mask is not
            empty. `p@` is then a share of the samples with a target, as in ReLA's code.

    Raises:
        ValueError: if `empty` or `ignore` has another value.
    """

    def __init__(
        self,
        empty: Literal["one", "zero", "skip"],
        ignore: Literal["exclude", "background", "target"],
        no_target: bool,
    ) -> None:
        if empty not in ("one", "zero", "skip"):
            raise ValueError(f"scores.empty: must be one, zero or skip; got {empty}")
        if ignore not in ("exclude", "background", "target"):
            raise ValueError(f"scores.ignore: must be exclude, background or target; got {ignore}")
        self.empty, self.ignore, self.no_target = empty, ignore, no_target

    @property
    def convention(self) -> str:
        """See `ScoreFamily`."""
        return (
            f"truth and mask empty: {self.empty}; ignored pixels: {self.ignore}; "
            "a parse fault counts as an empty mask with IoU 0"
        )

    @property
    def knows_ignored(self) -> bool:
        """True: `parts` uses ignored pixels as `ignore` says."""
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """See `ScoreFamily`."""
        absent = ("n_acc", "t_acc") if self.no_target else ()
        return ("giou", "ciou", *map(_name, _PRECISIONS), *absent)

    def parts(
        self, saliency: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None, faulty: bool = False
    ) -> Parts:
        """See `ScoreFamily`."""
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
        """Name of the part that is 1 for the samples over which `p@` is averaged, else 0."""
        return "target" if self.no_target else "counted"

    def summary(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `ScoreFamily`."""
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
    """Return the name of a precision score, such as `p@.5`."""
    return f"p@{threshold:.1f}".replace("0.", ".")
