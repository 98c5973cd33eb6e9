"""`python -m segrl.score pred=DIR gt=DIR`: score predicted masks or grey maps against ground truth.

The predictions may come from any program. The code is that of `python -m segrl.evaluate`: on the same masks
both print the same digits.
"""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from segrl.host.files import write_whole
from segrl.runs.command import enter
from segrl.runs.configuration import check


def job(cfg: DictConfig) -> None:
    """Score every pair of files, print the table, and write the scores to `out` if set.

    Raises:
        ValueError: if a folder, a file or the configuration is wrong, or the sizes of a pair differ.
    """
    check(cfg, "score")
    for key in ("pred", "gt"):  # before anything heavy is imported
        if not Path(cfg[key]).is_dir():
            raise ValueError(
                f"{key}: must be a folder; {cfg[key]} "
                f"{'is a file' if Path(cfg[key]).exists() else 'does not exist'}"
            )
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ValueError(f"out: must be a .json file in a folder that exists; got {out}")
    from hydra.utils import instantiate

    from segrl.data.image_mask import pair_maps
    from segrl.data.transforms import read_map, read_mask
    from segrl.metrics.parts import scores
    from segrl.runs.tables import scores_text

    metrics = [cfg.metrics] if isinstance(cfg.metrics, str) else cfg.metrics
    family = instantiate(cfg.scores, **({} if metrics is None else {"metrics": metrics}))
    pairs = pair_maps(Path(cfg.pred), Path(cfg.gt), "" if cfg.keep is None else str(cfg.keep))
    rows = []
    for number, (prediction, ground_truth) in enumerate(pairs, 1):
        saliency, truth = read_map(prediction), read_mask(ground_truth)
        if saliency.shape != truth.shape:
            raise ValueError(
                f"{prediction}: must have the size of its ground truth; "
                f"it is {saliency.shape[1]}x{saliency.shape[0]}, "
                f"{ground_truth} is {truth.shape[1]}x{truth.shape[0]}"
            )
        rows.append(family.parts(saliency, truth, None))
        if number % 500 == 0:
            print(f"  {number}/{len(pairs)}", flush=True)
    table = scores(family, rows, cfg.draws, cfg.seed)
    print(scores_text({Path(cfg.pred).name: table}, {Path(cfg.pred).name: len(rows)}))
    print(family.convention)
    if out is not None:
        report = {
            **{name: score.as_json()["value"] for name, score in table.items()},
            "n": len(rows), "convention": family.convention,
            "intervals": {name: score.interval for name, score in table.items()},
        }  # fmt: skip
        write_whole(out, json.dumps(report, indent=2) + "\n")
        print(f"written to {out}")


def main() -> None:
    """Run the command line."""
    enter("score", job)


if __name__ == "__main__":
    main()
