"""`python -m segrl.evaluate +suite=NAME [model=FOLDER]`: score a policy on benchmarks.

With `+experiment=NAME` in place of a suite, the test sets of the experiment are used.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from segrl.host.signals import Stopped, held
from segrl.runs.command import enter
from segrl.runs.configuration import check, take_in_instructions
from segrl.runs.resuming import saved
from segrl.tracking.run_folder import RunFolder


def job(cfg: DictConfig) -> float | None:
    """Run one evaluation.

    Returns:
        The score `objective_metric`, which a sweep compares; None if it is unset.

    Raises:
        ValueError: if the configuration or a file is wrong.
        Stopped: after a signal, once the samples that are kept have been reported.
    """
    if cfg.ckpt_path is not None:
        raise ValueError(
            f"ckpt_path: must be null in an evaluation; got {cfg.ckpt_path} "
            "(init_from=CHECKPOINT or model=FOLDER names the policy)"
        )
    if cfg.resume is not None:
        cfg = _resumed(Path(cfg.resume))
    elif cfg.model is not None:
        _take_model(cfg, Path(cfg.model))
    if cfg.testsets:  # test sets have their own roots, so the files of `data` need not exist
        cfg.sources = {key: owners for key, owners in cfg.sources.items() if not key.startswith("data.")}
    cfg.data.batch_size = 1  # no training, so the training set may have any size
    if OmegaConf.is_missing(cfg.data, "train"):  # no training, so `data.train` may be unset
        cfg.data.train = None
    check(cfg, "evaluate")
    take_in_instructions(cfg)
    from segrl.runs.evaluation import Evaluation

    evaluation = Evaluation.build(cfg)
    try:
        return evaluation.run()
    except Stopped as stop:
        with held():
            evaluation.stopped(stop)
        raise


def _resumed(folder: Path) -> DictConfig:
    """Return the saved configuration of an evaluation, with `resume` set to its folder.

    Raises:
        ValueError: if the folder holds none or a damaged one, or the command line gives a key another value.
    """
    from hydra.core.hydra_config import HydraConfig

    config = RunFolder(folder).config
    if not config.is_file() or "\nsuite:" not in config.read_text(errors="replace"):
        raise ValueError(f"resume: must be the folder of an evaluation; {folder} holds no config.yaml of one")
    said = [o.removeprefix("++") for o in HydraConfig.get().overrides.task if not o.startswith("resume=")]
    before = saved(config, "resume", "evaluate", said)
    before.resume = str(folder)
    return before


def _take_model(cfg: DictConfig, folder: Path) -> None:
    """Set policy, grammar, mask head, engine and precision as the `segrl.json` of a folder says.

    Groups and values of the command line take precedence. From a folder without `segrl.json` only the weights
    are used.

    Args:
        cfg: composed configuration, changed in place.
        folder: Hugging Face folder.

    Raises:
        ValueError: if it is no such folder, its `segrl.json` is damaged, or it has none and the command line
            does not choose policy, grammar and mask head.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from segrl.models.policy_card import PARTS, located, read

    if not (folder / "config.json").is_file():
        raise ValueError(f"model: must be a Hugging Face folder; {folder} has no config.json")
    card = read(folder)
    said = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    chosen = {override.key_or_group for override in said}
    if not card and (missing := [part for part in ("policy", "grammar", "head") if part not in chosen]):
        raise ValueError(
            f"model: must hold segrl.json, or policy, grammar and head must be given; "
            f"{folder} has none, and {missing[0]}=GROUP is not given"
        )
    for part in PARTS:
        if part in card and part not in chosen:
            cfg[part] = {name: located(value, cfg.paths.weights) for name, value in card[part].items()}
    # A trainer group chooses devices, so it does not replace the card's precision.
    if card and not chosen & {"policy", "policy_precision", "trainer.precision"}:
        cfg.trainer.precision = card["precision"]["passes"]
    OmegaConf.update(cfg, "policy.weights", str(folder), force_add=True)
    for override in said:  # values of the command line take precedence
        key = override.key_or_group
        if key.split(".")[0] in card and "." in key and not override.is_delete():
            OmegaConf.update(cfg, key, override.value())
    cfg.sources = {key: owners for key, owners in cfg.sources.items() if key != "policy.weights"}


def main() -> None:
    """Run the command line."""
    enter("evaluate", job)


if __name__ == "__main__":
    main()
