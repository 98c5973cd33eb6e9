"""Check the integrity of a dataset on disk: counts, missing partners, mask values, sizes, duplicates.

Bad files are reported and do not stop the check.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from segrl.data.boundary import reading
from segrl.data.chat_traces import names_places
from segrl.data.pictures import NEEDED, header
from segrl.data.survey import Item, Survey, counted, first_names
from segrl.data.transforms import mask_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Result of reading one sample."""

    id: str
    digest: str | None = None
    """SHA-1 of the image's bytes; None if its file or header cannot be read."""
    size: tuple[int, int] | None = None
    """Width and height of the image as stored."""
    turned: bool = False
    """Whether EXIF asks for a rotation or a flip."""
    kind: str | None = None
    """Kind of the mask file's values, see `mask_kind`; None if the mask is drawn from annotations."""
    other_size: str | None = None
    """Size of the image, and of the mask or in the annotations, if they differ."""
    share: float | None = None
    """Share of the image that is object; None for samples with a trace, which have no mask."""
    ignored: bool = False
    """Whether the sample has pixels that are not scored."""
    places: bool | None = None
    """True if the sample's thought names coordinates; None if it has no thought."""
    fault: str | None = None
    """Why the sample cannot be read; None if it can."""


def look(item: Item) -> Finding:
    """Read one sample as its loader does and return the finding; a bad file is a fault, not an exception."""
    try:
        with reading(item.image, NEEDED):
            content = item.image.read_bytes() if item.content is None else item.content()
        image = header(item.image, content)
    except ValueError as error:
        return Finding(id=item.id, fault=" ".join(str(error).split()))
    digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    seen: dict[str, Any] = {"id": item.id, "digest": digest, "size": image.size, "turned": image.turn != 1}
    try:
        wanted = header(item.mask).shown if item.mask is not None else item.size
        size = image.size
        if wanted is not None and wanted not in (size, image.shown):
            whose = "the annotations say" if item.mask is None else "mask"
            seen["other_size"] = f"{item.id}: image {size[0]}x{size[1]}, {whose} {wanted[0]}x{wanted[1]}"
        if item.mask is not None:
            seen["kind"] = mask_kind(item.mask)
        sample = item.sample()
    except ValueError as error:
        return Finding(**seen, fault=" ".join(str(error).split()))
    return Finding(
        **seen,
        share=None if sample.trace is not None else float(sample.mask.mean()),
        ignored=sample.ignore is not None,
        places=None if sample.trace is None else names_places(sample.trace.thought),
    )


@dataclass(slots=True, kw_only=True)
class SplitReport:
    """Numbers of one split, and the ids of samples that need attention."""

    name: str
    samples: int
    published: int | None
    images: int
    without_mask: list[str]
    without_image: list[str]
    faults: list[str]
    """Files that cannot be listed or read, one line each."""
    other_size: list[str]
    turned: list[str]
    kinds: dict[str, int]
    share: tuple[float, float, float] | None
    """Least, median and largest share of an image that is object."""
    empty: list[str]
    full: list[str]
    ignored: int
    """Number of samples with pixels that are not scored."""
    thoughts: int
    """Number of samples with a thought to imitate."""
    places: int
    """Number of samples whose thought names coordinates."""
    unread: dict[str, int]
    """Number of files that no loader reads, by suffix, and of "hidden" files and "sub folders"."""

    @property
    def wrong(self) -> bool:
        """Whether scores would not be comparable: missing or unreadable files, or not the published count."""
        count_differs = self.published is not None and self.published != self.samples
        return bool(self.without_mask or self.without_image or self.faults or count_differs)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        against = (
            "no count is published"
            if self.published is None
            else f"published {self.published}: "
            f"{'as it should be' if self.published == self.samples else 'DIFFERS'}"
        )
        told = [f"{self.name}: {self.samples} samples on {self.images} images ({against})"]
        for what, names in (
            ("WITHOUT A MASK", self.without_mask), ("WITHOUT AN IMAGE", self.without_image),
            ("other size", self.other_size), ("EXIF-rotated", self.turned),
            ("empty masks", self.empty), ("full masks", self.full),
        ):  # fmt: skip
            told.append(f"  {what:<18}{len(names)}{f' ({first_names(names)})' if names else ''}")
        if self.kinds:
            kinds = sorted(self.kinds.items(), key=lambda kind: -kind[1])
            told.append(f"  {'mask values':<18}" + ", ".join(f"{name} in {count}" for name, count in kinds))
        if self.share is not None:
            told.append(
                f"  {'object share':<18}least {self.share[0]:.4f}, "
                f"median {self.share[1]:.4f}, largest {self.share[2]:.4f}"
            )
        if self.unread:
            told.append(f"  {'not read':<18}{counted(Counter(self.unread))}")
        if self.thoughts:
            told.append(
                f"  {'thoughts':<18}{self.thoughts}, of which {self.places} name coordinates: "
                "those stay as written, while solutions are rescaled to the policy's frame"
            )
        if self.ignored:
            told.append(f"  {'ignored regions':<18}in {self.ignored}")
        told.append(f"  {'UNFIT' if self.faults else 'unfit':<18}{len(self.faults)}")
        told += [f"    {line}" for line in self.faults[:5]]
        return told + (
            [f"    and {len(self.faults) - 5} more (out=FILE.json has all)"] if len(self.faults) > 5 else []
        )


@dataclass(slots=True, kw_only=True)
class Report:
    """Reports of all splits, and the images that several splits share."""

    splits: list[SplitReport]
    duplicates: list[str] = field(default_factory=list)
    """Images with the same bytes in several splits, one line each."""
    licences: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Whether a split is wrong. Duplicates do not count: some published splits share images."""
        return any(split.wrong for split in self.splits)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        told = [line for split in self.splits for line in split.lines()]
        if len(self.splits) > 1:
            told.append(f"the same image in several splits: {len(self.duplicates)}")
            told += [f"  {line}" for line in self.duplicates[:5]]
        return told + [f"licence of {name}: {licence}" for name, licence in self.licences.items()]

    def as_json(self) -> dict[str, Any]:
        """Return the whole report, with all names, as plain data."""
        return {**asdict(self), "wrong": self.wrong}


def _gathered(name: str, survey: Survey, published: int | None, found: list[Finding]) -> SplitReport:
    """Return the report of one split."""
    shares = [one.share for one in found if one.share is not None]
    return SplitReport(
        name=name, samples=len(survey.items), published=published,
        images=len({one.digest for one in found} - {None}),
        without_mask=list(survey.without_mask), without_image=list(survey.without_image),
        faults=survey.faults + [one.fault for one in found if one.fault is not None],
        other_size=[one.other_size for one in found if one.other_size is not None],
        turned=[one.id for one in found if one.turned],
        kinds=dict(Counter(one.kind for one in found if one.kind is not None)),
        share=(min(shares), median(shares), max(shares)) if shares else None,
        empty=[one.id for one in found if one.share == 0], full=[one.id for one in found if one.share == 1],
        ignored=sum(one.ignored for one in found), unread=dict(survey.unread),
        thoughts=sum(one.places is not None for one in found), places=sum(bool(one.places) for one in found),
    )  # fmt: skip


def _duplicates(found: Mapping[str, list[Finding]]) -> list[str]:
    """Return the images that several splits hold, one line each: `split/id = split/id`."""
    places: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for split, findings in found.items():
        for one in findings:
            if one.digest is not None:
                places[one.digest].setdefault(split, one.id)
    return [
        " = ".join(f"{split}/{name}" for split, name in at.items()) for at in places.values() if len(at) > 1
    ]


def check(
    surveys: Mapping[str, Survey],
    published: Mapping[str, int | None],
    say: Callable[[str], None],
    threads: int,
) -> Report:
    """Read every sample of every split and return the report.

    Args:
        surveys: by split, the samples on disk.
        published: by split, the number of samples that its owners publish; None if there is no such number.
        say: called with a line of progress at every tenth of a split.
        threads: number of threads that decode.
    """
    found: dict[str, list[Finding]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, survey in surveys.items():
            found[name] = list(_counted(pool.map(look, survey.items), name, survey, say))
    reports = [_gathered(name, survey, published.get(name), found[name]) for name, survey in surveys.items()]
    return Report(splits=reports, duplicates=_duplicates(found))


def _counted(
    findings: Iterable[Finding], name: str, survey: Survey, say: Callable[[str], None]
) -> Iterable[Finding]:
    """Yield the findings unchanged, and report progress to `say` at every tenth."""
    total = len(survey.items)
    for done, finding in enumerate(findings, 1):
        if done * 10 // total > (done - 1) * 10 // total:
            say(f"{name}: {done} of {total}")
        yield finding
