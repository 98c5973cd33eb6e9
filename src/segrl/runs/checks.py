"""Checks of a configuration that import its parts or read its files, but load no weights of a policy.

Each check raises ValueError naming the key that is wrong.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segrl.data.datamodule import SegDataModule
from segrl.metrics.saliency import NAMES
from segrl.tracking.checkpoints import read_checkpoint
from segrl.tracking.run_folder import RunFolder


def words(cfg: DictConfig) -> None:
    """Raise ValueError unless the grammar can be built and says all that the reward reads.

    The reward's terms name what they read under `needs`; `stage.shaping` reads "steps".
    """
    grammar = type(instantiate(cfg.grammar))
    wanted = {f"reward.terms.{name}": term.get("needs", []) for name, term in cfg.reward.terms.items()}
    if cfg.stage.get("shaping") is not None:
        wanted["stage.shaping"] = ["steps"]
    for key, words in wanted.items():
        for word in words:
            if word not in grammar.says:
                raise ValueError(
                    f"{key}: must have a grammar that expresses {word}; "
                    f"{grammar.__name__} expresses {', '.join(sorted(grammar.says))}"
                )


def checkpoints(cfg: DictConfig) -> None:
    """Raise ValueError for a checkpoint that is damaged or does not fit the run.

    `init_from` must hold a policy. `ckpt_path` must be of the same stage and start from the same `init_from`.
    The best.ckpt of a resumed run is checked now, although it is first used after the training.
    """
    if cfg.init_from is not None:
        saved = read_checkpoint(Path(cfg.init_from), "init_from")
        if not any(name.startswith("policy.") for name in saved["state_dict"]):
            raise ValueError(
                f"init_from: must be a checkpoint that holds a policy; "
                f"{cfg.init_from} is of {saved.get('stage', 'another program')}"
            )
    if cfg.resume is not None and (best := RunFolder(Path(cfg.resume)).best).exists():
        read_checkpoint(best, "resume")
    if cfg.ckpt_path is not None:
        key, ours = "resume" if cfg.resume else "ckpt_path", cfg.stage._target_.rpartition(".")[2]
        saved = read_checkpoint(Path(cfg.ckpt_path), key)
        if saved.get("stage", ours) != ours:
            raise ValueError(
                f"{key}: must be a checkpoint of {ours}; "
                f"{cfg.ckpt_path} is one of {saved['stage']} (init_from loads its policy)"
            )
        if saved.get("init_from") != cfg.init_from:
            raise ValueError(
                f"init_from: must be {saved.get('init_from')}, as in the run that wrote {cfg.ckpt_path}, "
                f"because the reference is made with it; got {cfg.init_from}"
            )


def ids(data: SegDataModule) -> None:
    """Raise ValueError if two samples of a test set share an id, by which their scores are kept."""
    for name, samples in data.test.items():
        twice = [one for one, count in Counter(samples.ids).items() if count > 1]
        if twice:
            raise ValueError(f"data.module.test.{name}: ids must be unique; {twice[0]} is there twice")


def metrics(cfg: DictConfig, data: SegDataModule) -> None:
    """Raise ValueError for an unknown name of a metric, which would otherwise fail after the training."""
    known = {
        split: [f"{split}/{dataset}/{metric}" for dataset in sets for metric in NAMES]
        for split, sets in {"test": data.test, "val": data.val}.items()
    }
    monitor = OmegaConf.select(cfg, "callbacks.best.monitor")
    for key, wanted, names in (
        ("objective_metric", cfg.objective_metric, known["test"] + known["val"]),
        ("callbacks.best.monitor", monitor, known["val"]),
    ):
        if wanted is not None and wanted not in names:
            raise ValueError(
                f"{key}: must be null or one of {', '.join(names) or 'a validation set'}; got {wanted}"
            )
