"""Salient, camouflaged and dichotomous segmentation: the scores of their tables, by the field's short names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from segrl.metrics.functional import tally as of
from segrl.metrics.functional.boundary import boundary_accuracy, boundary_iou, correction_effort
from segrl.metrics.functional.overlap import intersection_union, iou, mean_absolute_error
from segrl.metrics.functional.structure import structure
from segrl.metrics.functional.weighted import weighted_f
from segrl.metrics.parts import Parts

_HALF = 128
NAMES = ("iou", "sm", "mae", "fault_rate")
"""What is scored of every answer while a policy trains."""

METRICS = (
    "sm", "wfm", "mae", "adp_e", "mean_e", "max_e", "adp_f", "mean_f", "max_f", "iou", "ciou", "hce", "biou", "mba",
)  # fmt: skip


def score(mask: np.ndarray, truth: np.ndarray, faulty: bool) -> dict[str, float]:
    """Return every score in `NAMES` of one answer; a faulty answer's mask is empty, and is scored as `Saliency` does."""
    if faulty and not truth.any():
        mask = np.ones_like(mask)
    values = (iou(mask, truth), structure(mask, truth), mean_absolute_error(mask, truth), float(faulty))
    return dict(zip(NAMES, values, strict=True))


class Saliency:
    """Scores of grey maps and of masks (as maps of 0 and 255), defined as in pysodmetrics 1.6.2.

    `sm` S-measure, `wfm` weighted F, `mae`, `adp_e mean_e max_e` E-measure, `adp_f mean_f max_f` F-measure (the mean and the
    largest value of the set's mean curve), `iou` mean per image, `ciou` all intersections over all unions, `hce` human
    correction effort, `biou` boundary IoU, `mba` mean boundary accuracy. The last five look at the mask of values from 128 up; `hce` stretches the map first, as
    pysodmetrics does.

    A map that is empty by a fault is scored as it is; where the truth is empty, too, that would be the right answer, and it is
    scored as a full map: `sm`, `iou`, E, `biou` and `mba` are 0, `mae` is 1. `ciou` takes it as it is: it adds nothing to either sum.

    Args:
        metrics: names of those to compute, in the order of the table.

    Raises:
        ValueError: if there is none, or one that has no such name.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ValueError(
                f"metrics: some of {', '.join(METRICS)} are needed; got {unknown[0] if unknown else 'none'}"
            )
        self.metrics = tuple(metrics)

    @property
    def convention(self) -> str:
        """What a reader of its numbers has to know, in one line."""
        return "pysodmetrics 1.6.2's definitions; adp_e and adp_f take an empty mask for a full one; both empty: IoU 1, by a fault 0"

    @property
    def knows_ignored(self) -> bool:
        """No: these scores have no notion of it."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """See `Family`."""
        return self.metrics

    def parts(
        self, saliency: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None, faulty: bool = False
    ) -> Parts:
        """See `Family`; raises ValueError for ignored pixels, which these scores do not know."""
        if ignore is not None and ignore.any():
            raise ValueError(
                "scores: a family that knows ignored pixels is needed (segrl.metrics.referring.Referring); "
                "these samples have some"
            )
        wanted, drawn = set(self.metrics), saliency
        if faulty and not truth.any():
            saliency = np.full_like(saliency, 255)
        found: dict[str, float | np.ndarray] = {}
        if wanted & {"sm", "mae", "adp_e", "mean_e", "max_e", "adp_f", "mean_f", "max_f"}:
            counted = of.tally(saliency, truth)
            found["sm"], found["mae"] = of.structure(counted), of.mean_absolute_error(counted)
            found["adp_e"], e_curve = of.enhanced(counted)
            found["adp_f"], f_curve = of.f_measure(counted)
            found |= {"e_curve": e_curve, "f_curve": f_curve}
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
        """See `Family`."""
        values = {name: mean[..., 0] for name, mean in means.items() if not name.endswith("_curve")}
        for letter in ("e", "f"):
            if (curve := means.get(f"{letter}_curve")) is not None:
                values |= {f"mean_{letter}": curve.mean(-1), f"max_{letter}": curve.max(-1)}
        if "union" in values:
            values["ciou"] = ratio(values["intersection"], values["union"])
        return {name: values[name] for name in self.metrics}


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Their ratio; not a number where there is nothing to divide by."""
    return np.divide(
        part, whole, out=np.full_like(np.asarray(part, np.float64), np.nan), where=np.asarray(whole) > 0
    )
