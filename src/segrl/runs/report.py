"""Compare the scores of test sets before and after a training: files, gains with intervals, picture."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segrl.host.files import write_whole
from segrl.metrics.functional.bootstrap import paired_bootstrap
from segrl.metrics.saliency import NAMES
from segrl.protocols import SampleSet
from segrl.runs.records import clusters, scores_of
from segrl.runs.scoring import DRAWN, Rows
from segrl.runs.tables import Comparison, Table, comparison_text, tell
from segrl.tracking.figures import Cell, sheet
from segrl.tracking.run_folder import RunFolder, masks_beside
from segrl.types import MaskPrompt, Sample

Scores = dict[str, dict[str, dict[str, float]]]
"""dataset -> sample id -> metric -> score."""


def save(found: Rows, path: Path) -> None:
    """Write one line of JSON per sample, and the first dataset's first masks to a .npz beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(found.values()), [])[:DRAWN]
    np.savez_compressed(
        masks_beside(path),
        **{str(i): row.mask for i, row in enumerate(first)},  # type: ignore[arg-type]
    )
    # The lines are written last: if they exist, the masks do.
    write_whole(path, "".join(json.dumps(row.line) + "\n" for dataset in found.values() for row in dataset))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines in a file that `save` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(lines: Iterable[Mapping[str, Any]]) -> Scores:
    """Return the scores `NAMES` of all lines."""
    table: Scores = {}
    for line in lines:
        own = scores_of(line)
        table.setdefault(line["dataset"], {})[line["id"]] = {name: own[name] for name in NAMES}
    return table


def readable(path: Path) -> Scores | None:
    """Return the scores in a file that `save` wrote, or None if it or its .npz is missing or damaged."""
    try:
        scored = scores(read_lines(path))
        with np.load(masks_beside(path), allow_pickle=False) as masks:
            drawn = [masks[name].ndim for name in masks.files]
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        return None
    return scored if scored and drawn and set(drawn) == {2} else None


def check_same_samples(before: Scores, ids: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError unless `ids`, by dataset, are the ids of the samples scored before."""
    for dataset, wanted in ids.items():
        if set(wanted) != set(before.get(dataset, {})):
            raise ValueError(
                f"data.module.test.{dataset}: must hold the samples scored before "
                f"(evaluation/before.jsonl); the ids differ"
            )


def compare(before: Scores, after: Scores, seed: int, drawn: Mapping[str, np.ndarray]) -> Table:
    """Compare the mean scores before and after.

    Args:
        before: scores before the training.
        after: scores after it.
        seed: of the bootstrap.
        drawn: clusters of the samples of `after` by dataset, int64 `[samples]` in its order
            (`records.clusters`).

    Raises:
        ValueError: if the two are not scores of the same samples.
    """
    check_same_samples(before, after)
    table: Table = {}
    for dataset, scored in after.items():
        table[dataset] = {}
        for name in NAMES:
            old = np.array([before[dataset][i][name] for i in scored])
            new = np.array([scored[i][name] for i in scored])
            table[dataset][name] = Comparison(
                before=float(old.mean()),
                after=float(new.mean()),
                gain=float((new - old).mean()),
                interval=paired_bootstrap(old, new, seed, clusters=drawn[dataset]),
                n=len(new),
                images=int(drawn[dataset].max()) + 1,
            )
    return table


def conclude(folder: Path, seed: int, updates: int, rate: float, unseen: Collection[str]) -> Table:
    """Compare the scores of a run before and after, and print the table, also to `table.txt`.

    Where the interval of the gain in IoU includes 0, a line below the table lists possible reasons.

    Args:
        folder: run folder with `evaluation/before.jsonl` and `after.jsonl`.
        seed: of the bootstrap.
        updates: number of updates of the run.
        rate: highest learning rate of the policy.
        unseen: test sets of photographs, if the policy has only seen drawn scenes.

    Raises:
        ValueError: if the two files do not score the same samples.
    """
    run = RunFolder(folder)
    lines = {"before": read_lines(run.before), "after": read_lines(run.after)}
    after: dict[str, list[dict[str, Any]]] = {}
    for line in lines["after"]:
        after.setdefault(line["dataset"], []).append(line)
    drawn = {dataset: clusters(found) for dataset, found in after.items()}
    table = compare(scores(lines["before"]), scores(lines["after"]), seed, drawn)
    texts = {(line["dataset"], line["id"]): line["text"] for line in lines["before"]}
    told = [comparison_text(table)]
    for dataset, metrics in table.items():
        low, high = metrics["iou"].interval
        if low <= 0 <= high:
            same = sum(line["text"] == texts[dataset, line["id"]] for line in after[dataset])
            told.append(_unmoved(dataset, same, len(after[dataset]), updates, rate, dataset in unseen))
    tell("\n".join(told), run.table)
    return table


def _unmoved(dataset: str, same: int, count: int, updates: int, rate: float, only_scenes: bool) -> str:
    """Return the line of possible reasons for no gain: same answers, few updates, only drawn scenes."""
    why = (
        f"\n{dataset}: the interval of its gain in IoU contains 0. "
        f"{same} of {count} answers are the same text as before; "
        f"{updates} updates at a learning rate of at most {rate:g} "
        f"(trainer.max_steps or max_epochs, stage.optimizer.lr)"
    )
    unseen = "; this policy was trained on drawn scenes only, and these are photographs (policy=nano)"
    return why + (unseen if only_scenes else "")


def means(scores: Scores) -> dict[str, float]:
    """Return the mean of each score, by its logged name `test/<dataset>/<metric>`."""
    return {
        f"test/{dataset}/{name}": float(np.mean([row[name] for row in rows.values()]))
        for dataset, rows in scores.items()
        for name in NAMES
    }


def draw(samples: SampleSet, before: Path, after: Path, path: Path) -> Path:
    """Draw the first `DRAWN` samples of a test set, answers before and after side by side, as one PNG.

    Args:
        samples: test set, the first one that was scored.
        before: file that `save` wrote before the training, with its masks beside it. If there is no such
            file, only the answers after the training are drawn.
        after: the same, after the training.
        path: file to write.

    Returns:
        `path`.
    """
    columns = [("after", after)] if not before.is_file() else [("before", before), ("after", after)]
    lines = {name: {x["id"]: x for x in read_lines(file)} for name, file in columns}
    masks = {name: np.load(masks_beside(file), allow_pickle=False) for name, file in columns}
    cells = []
    for i in range(min(DRAWN, len(samples))):
        sample = samples[i]
        said = {name: lines[name][sample.id] for name, _ in columns}
        cells.append([
            _cell(sample, f"{name}: IoU {scores_of(said[name])['iou']:.2f}", said[name], masks[name][str(i)])
            for name, _ in columns
        ])  # fmt: skip
    pairs = [sum(cells[i : i + 2], []) for i in range(0, len(cells), 2)]
    return sheet(pairs, path)


def _cell(sample: Sample, title: str, line: Mapping[str, object], mask: np.ndarray) -> Cell:
    prompt = MaskPrompt.of(line["boxes"], line["points"], line["labels"]) if "boxes" in line else None
    return Cell(
        image=sample.image,
        truth=sample.mask,
        mask=mask,
        prompt=prompt,
        caption=f"{title}\n{line['text']}",
    )
