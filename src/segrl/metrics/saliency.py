"""Scores of salient, camouflaged and dichotomous segmentation, under the field's short names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from segrl.metrics.functional import tally as of
from segrl.metrics.functional.boundary import boundary_accuracy, boundary_iou, correction_effort
from segrl.metrics.functional.overlap import intersection_union, iou
from segrl.metrics.functional.weighted import weighted_f
from segrl.metrics.parts import Parts
from segrl.types import Answer, Sample

_HALF = 128
METRICS = (
    "sm", "wfm", "mae", "adp_e", "mean_e", "max_e", "adp_f", "mean_f", "max_f",
    "iou", "ciou", "hce", "biou", "mba",
)  # fmt: skip


class Saliency:
    """Scores of grey maps and of masks (as maps of 0 and 255), defined as in pysodmetrics 1.6.2.

    `sm`: S-measure. `wfm`: weighted F-measure. `mae`: mean absolute error. `adp_e mean_e max_e`: E-measure.
    `adp_f mean_f max_f`: F-measure (at the adaptive threshold; mean and maximum of the set's mean curve).
    `iou`: mean IoU of the images. `ciou`: all intersections over all unions. `hce`: human correction effort.
    `biou`: boundary IoU. `mba`: mean boundary accuracy. The last five use the mask of values from 128 up; for
    `hce` the map is stretched first, as in pysodmetrics.

    The empty map of a fault is scored as it is. If the truth is empty, too, it would be right, so it is
    scored as a full map: `sm`, `iou`, E-measures, `biou` and `mba` are 0, `mae` is 1. `ciou` uses the empty
    map, which adds nothing to either sum.

    Args:
        metrics: names of the scores to compute, in the order of the table.

    Raises:
        ValueError: if there is no name, or an unknown one.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ValueError(
                f"metrics: must be some of {', '.join(METRICS)}; got {unknown[0] if unknown else 'none'}"
            )
        self.metrics = tuple(metrics)

    @property
    def convention(self) -> str:
        """See `ScoreFamily`."""
        return (
            "pysodmetrics 1.6.2's definitions; adp_e and adp_f score an empty mask as a full one; "
            "truth and mask empty: IoU 1, after a parse fault 0"
        )

    @property
    def knows_ignored(self) -> bool:
        """False: `parts` refuses ignored pixels."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """See `ScoreFamily`."""
        return self.metrics

    def parts(
        self, saliency: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None, faulty: bool = False
    ) -> Parts:
        """See `ScoreFamily`. Raise ValueError for ignored pixels, which these scores do not support."""
        if ignore is not None and ignore.any():
            raise ValueError(
                "scores: must be a family that supports ignored pixels, which these samples have "
                "(segrl.metrics.referring.Referring)"
            )
        wanted, drawn = set(self.metrics), saliency
        if faulty and not truth.any():
            saliency = np.full_like(saliency, 255)
        found: dict[str, float | np.ndarray] = {}
        if wanted & {"sm", "mae", "adp_e", "mean_e", "max_e", "adp_f", "mean_f", "max_f"}:
            counted = of.tally(saliency, truth)
            found["sm"], found["mae"] = of.structure(counted), of.mean_absolute_error(counted)
            if wanted & {"adp_e", "mean_e", "max_e"}:
                found["adp_e"], found["e_curve"] = of.e_measure(counted)
            if wanted & {"adp_f", "mean_f", "max_f"}:
                found["adp_f"], found["f_curve"] = of.f_measure(counted)
        if "wfm" in wanted:
            found["wfm"] = weighted_f(saliency, truth)
        if wanted & {"iou", "ciou", "hce", "biou", "mba"}:
            mask = saliency >= _HALF
            found["iou"] = iou(mask, truth)
            found["intersection"], found["union"] = intersection_union(drawn >= _HALF, truth, None)
            for name, measure in (
                ("hce", correction_effort),
                ("biou", boundary_iou),
                ("mba", boundary_accuracy),
            ):
                if name in wanted:
                    found[name] = measure(of.above_half(saliency) if name == "hce" else mask, truth)
        return {name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in found.items()}

    def summary(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `ScoreFamily`."""
        values = {name: mean[..., 0] for name, mean in means.items() if not name.endswith("_curve")}
        for letter in ("e", "f"):
            if (curve := means.get(f"{letter}_curve")) is not None:
                values |= {f"mean_{letter}": curve.mean(-1), f"max_{letter}": curve.max(-1)}
        if "union" in values:
            values["ciou"] = ratio(values["intersection"], values["union"])
        return {name: values[name] for name in self.metrics}


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return `part / whole`; NaN where `whole` is 0."""
    return np.divide(
        part, whole, out=np.full_like(np.asarray(part, np.float64), np.nan), where=np.asarray(whole) > 0
    )


BRIEF = Saliency(("iou", "sm", "mae"))
"""The family of validation sets, and of test sets before and after a training."""

NAMES = (*BRIEF.names, "fault_rate")
"""Scores that a training logs and compares."""


def brief(answer: Answer, sample: Sample) -> Parts:
    """Return the parts of `BRIEF` of one answer, without ignored pixels, and its `fault_rate`."""
    faulty = answer.parsed.fault is not None
    mask = sample.counted(answer.mask).astype(np.uint8) * 255
    return BRIEF.parts(mask, sample.mask, None, faulty) | {"fault_rate": np.array([float(faulty)])}
