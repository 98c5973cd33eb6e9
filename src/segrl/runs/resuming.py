"""Read the saved configuration of a run, to resume or export it.

A config.yaml may come from anyone, so nothing that it names is called before it has been checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segrl.runs.configuration import asset, refuse_unread
from segrl.runs.messages import Said
from segrl.tracking.run_folder import RunFolder

# Present names of parts, by the names in configurations of older runs.
_MOVED = {
    "segrl.stages.tower.TowerStage": "segrl.nano.tower.TowerStage",
    "segrl.stages.mask_head.MaskHeadStage": "segrl.nano.mask_head.MaskHeadStage",
    "segrl.data.listed.Listed": "segrl.data.jsonl.JsonlDataset",
    "segrl.data.jsonl.Listed": "segrl.data.jsonl.JsonlDataset",
    "segrl.data.traces.Annotator": "segrl.data.annotator.Annotator",
}


def read(path: Path, key: str) -> DictConfig:
    """Return the configuration in a file, unresolved; nothing that it names is imported, called or resolved.

    Args:
        path: path of `config.yaml`.
        key: key that names the file, for error messages.

    Raises:
        ValueError: if the file is no configuration, or holds anything but plain values, references to its own
            keys, and the resolvers of `host.foreign`.
    """
    import yaml

    from segrl.host.foreign import strange

    try:
        loaded = OmegaConf.load(path)
        raw = OmegaConf.to_container(loaded, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"{key}: {path} must be a configuration; it cannot be read ({' '.join(str(error).split())[:200]})"
        ) from None
    if not isinstance(loaded, DictConfig) or not raw:
        raise ValueError(f"{key}: {path} must be a configuration; it has none of its keys")
    for where, value in strange(raw, whole=True):
        raise ValueError(
            f"{key}: {path} must hold plain values and references to its own keys; {where} is {value!r:.80}"
        )
    return OmegaConf.create(_renamed(raw))


def _renamed(node: object) -> Any:  # noqa: ANN401 - a node of the kind that came
    """Return plain containers in which the old names of parts are replaced by the present ones."""
    if isinstance(node, dict):
        return {key: _renamed(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_renamed(value) for value in node]
    return _MOVED.get(node, node) if isinstance(node, str) else node


def saved(path: Path, key: str, command: str, overrides: list[str] | None = None) -> DictConfig:
    """Return the checked configuration of a run or an evaluation that is resumed, with overrides applied.

    Args:
        path: path of `config.yaml`, which may come from anyone.
        key: key that names the file, for error messages.
        command: command that resumes, "train" or "evaluate".
        overrides: `a.b=c` from the command line; for an evaluation they must equal the saved values.

    Raises:
        ValueError: if the file is no configuration, names a part or a model architecture that is neither
            segrl's nor given in `overrides`, or an override cannot be applied.
    """
    from segrl.runs.schema.commands import COMMANDS
    from segrl.runs.schema.walk import ForeignPart, faults

    loaded = read(path, key)
    if not set(COMMANDS[command].model_fields) & set(loaded):
        raise ValueError(f"{key}: {path} must be a configuration; it has none of its keys")
    _without_peak(loaded, path, key)
    typed, changed = _lay_over(loaded, key, overrides or [])
    if changed and command == "evaluate":
        raise ValueError(
            f"{key}: must keep the configuration of the evaluation; {changed[0]} cannot be changed"
        )
    own = "(if it is your own{}, write {}={} on the command line)"
    if found := faults(loaded, COMMANDS[command], typed):
        first = found[0]
        out = f" {own.format(' code', first.key, first.target)}" if isinstance(first, ForeignPart) else ""
        raise ValueError(f"{key}: {path} must be a configuration of segrl: {first}{out}")
    refuse_unread(loaded, Said(changed, []))
    head = str(OmegaConf.select(loaded, "head.architecture"))
    if "head.architecture" not in typed and "head" in loaded and not _shipped(head):
        raise ValueError(
            f"{key}: {path}: head.architecture must ship with segrl or sam2; got {head} "
            f"{own.format('', 'head.architecture', head)}"
        )
    return loaded


def _without_peak(cfg: DictConfig, path: Path, key: str) -> None:
    """Remove the key `max_lr` of a one-cycle schedule, which older configurations have.

    Raises:
        ValueError: if it is not `stage.optimizer.lr`, the rate at which the present schedule peaks.
    """
    schedule = OmegaConf.select(cfg, "stage.schedule")
    if not isinstance(schedule, DictConfig) or schedule.get("_target_") != "segrl.stages.schedule.one_cycle":
        return
    rate = OmegaConf.select(cfg, "stage.optimizer.lr")
    if "max_lr" in schedule and schedule.max_lr != rate:
        raise ValueError(
            f"{key}: {path}: stage.schedule.max_lr must be stage.optimizer.lr ({rate}), "
            f"where every group peaks at its own rate; got {schedule.max_lr} "
            f"(remove it from the file: the run continues at the rates in its checkpoint)"
        )
    schedule.pop("max_lr", None)


def _lay_over(cfg: DictConfig, key: str, overrides: list[str]) -> tuple[set[str], list[str]]:
    """Set existing keys of a configuration in place.

    Returns:
        The names of the keys, and the overrides that changed a value.

    Raises:
        ValueError: if an override adds or deletes a key, or names one that the configuration lacks.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed, changed = set(), []
    for override in overrides:
        said = OverridesParser.create().parse_override(override)
        name = said.key_or_group
        parent, _, last = name.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else None
        if said.is_add() or said.is_delete() or not isinstance(node, DictConfig) or last not in node:
            raise ValueError(f"{key}: must keep the configuration of the run; {override} cannot be changed")
        typed.add(name)
        if node[last] != said.value():
            changed.append(override)
            OmegaConf.update(cfg, name, said.value())
    return typed, changed


def _shipped(architecture: str) -> bool:
    """Return whether an architecture's YAML is segrl's or sam2's; any other could name code to call."""
    return (
        Path(architecture).parent == Path(asset(""))
        or re.fullmatch(r"configs/sam2(\.1)?/[\w.+]+\.yaml", architecture) is not None
    )


def resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the saved configuration of the run folder `cfg.resume`, with overrides applied.

    Args:
        cfg: composed configuration of the command line.
        overrides: overrides of the command line.

    Raises:
        ValueError: if the folder holds no run or has lost its checkpoint, or if an override names a key that
            the run lacks, or one of optimizer, schedule or critic.
    """
    home = Path(cfg.resume)
    config, checkpoint = RunFolder(home).config, RunFolder(home).last
    if not config.is_file():
        what = "is a folder" if config.is_dir() else "does not exist"
        raise ValueError(f"resume: must be a run folder, which holds config.yaml; {config} {what}")
    changes = [o.removeprefix("++") for o in overrides if not o.startswith("resume=")]
    for change in changes:
        if re.match(r"stage\.(optimizer|schedule|critic|critic_lr)\b", change):
            raise ValueError(
                f"resume: must keep optimizer, schedule and critic as saved; {change} cannot be changed"
            )
    before = saved(config, "resume", "train", changes)
    before.resume, before.paths.run = str(home), str(home)
    if checkpoint.exists():
        before.ckpt_path = str(checkpoint)
    else:
        _begin_anew(home, read(config, "resume"))
    return before


def _begin_anew(home: Path, cfg: DictConfig) -> None:
    """Print that a run without last.ckpt begins at its first update.

    Raises:
        ValueError: if the run is finished, or must have saved a checkpoint before.
    """
    from segrl.runs.training import say
    from segrl.tracking.callbacks import read_history

    folder, every = RunFolder(home), OmegaConf.select(cfg, "callbacks.checkpoint.every_n_steps")
    if folder.finished:
        raise ValueError(
            f"resume: must have its checkpoint, because the run is finished; {folder.last} is missing"
        )
    steps = [line["step"] for line in read_history(folder.history)]
    before = int(max(steps[:-1], default=0))  # a checkpoint due then was saved before the next line
    if folder.best.exists() or (isinstance(every, int) and before >= every):
        raise ValueError(
            f"resume: must have its checkpoint, because the run has saved one; {folder.last} is missing "
            f"(to start again, remove history.jsonl and checkpoints there)"
        )
    say(f"{home} holds no checkpoint: the run starts again at its first update")
