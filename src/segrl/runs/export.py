"""Export a trained policy as a Hugging Face folder, with `segrl.json` and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from segrl.runs import licences
from segrl.runs.configuration import asset
from segrl.runs.resuming import read
from segrl.tracking.run_folder import RunFolder, read_json

if TYPE_CHECKING:
    from segrl.models.hf_vlm import HFPolicy
    from segrl.protocols import Grammar

# Queries for which a model card shows the chat text, by loader of the training data; None: no query.
_QUERIES: dict[str, tuple[str | None, ...]] = {
    "ReferringExpressions": ("QUERY",), "ReasonSeg": ("QUERY",), "JsonlDataset": (None, "QUERY"),
}  # fmt: skip
# Keys that the model card and `segrl.json` are made from.
_CARD = (
    "name", "policy._target_", "grammar._target_", "head._target_", "stage._target_", "reward",
    "rollout.max_tokens", "trainer.precision", "data.module.train._target_", "policy.weights",
)  # fmt: skip


def export_policy(
    ckpt: Path, out: Path, note: str, head_checkpoint: str | None = None, licence: str | None = None
) -> None:
    """Write the policy of a checkpoint to a folder that transformers and segrl can load.

    The folder holds weights, processor, generation config, instructions, `segrl.json` and model card.

    Args:
        ckpt: checkpoint in the `checkpoints` folder of a run.
        out: folder to write.
        note: first paragraph of the model card.
        head_checkpoint: the mask head's checkpoint, as `segrl.json` names it; if None, the run's is named.
        licence: licence of the weights; if None, it follows from base model and data (`licences.of`).

    Raises:
        ValueError: if `ckpt` is not in a run's folder, is damaged or holds no policy, or if a file of the run
            is damaged.
    """
    from hydra.utils import instantiate

    from segrl.models import policy_card
    from segrl.prompts import instructions
    from segrl.tracking.checkpoints import learned_policy

    run = RunFolder.of_checkpoint(ckpt)
    if not ckpt.is_file():
        raise ValueError(
            f"ckpt: must be a checkpoint; {ckpt} {'is a folder' if ckpt.is_dir() else 'does not exist'}"
        )
    if not run.config.is_file():
        raise ValueError(
            f"ckpt: must be a checkpoint in a run's folder, RUN/checkpoints/last.ckpt; "
            f"got {ckpt}, and {run} holds no config.yaml"
        )
    run.check_kinds("ckpt")
    cfg = read(run.config, "ckpt")
    own = _own(cfg, run.config)
    learned = learned_policy(ckpt, "ckpt")
    parts = policy_card.checked(described(cfg, head_checkpoint), run.config)
    grammar = instantiate(own.grammar)
    parts["grammar"]["instructions"] = {grammar.section: grammar.texts}  # the texts instead of their file
    policy = instantiate(own.policy)
    policy.load_policy(learned)
    asked = _asked(policy, grammar, str(cfg.data.module.train._target_))
    text = card(run.path, note, ckpt, asked, licence)
    policy.save(out, own.max_tokens)
    # The file also holds the texts of other grammars, if the run was given them.
    given = OmegaConf.select(own, "grammar.instructions")
    others: Any = OmegaConf.to_container(given) if isinstance(given, DictConfig) else {}
    beside = instructions.written({**others, grammar.section: grammar.texts})
    (out / instructions.NAME).write_text(beside, encoding="utf-8")
    policy_card.write(out, parts)  # and digests of the files written so far
    (out / "README.md").write_text(text)


def _own(cfg: DictConfig, path: Path) -> DictConfig:
    """Return the parts that the export instantiates, resolved: policy, grammar, head; and `max_tokens`.

    The configuration may come from anyone, so it is checked first. Its other parts are not instantiated.

    Args:
        cfg: saved configuration of the run, unresolved.
        path: its file, for error messages.

    Raises:
        ValueError: if these parts hold anything but segrl's classes and plain values, or a key of `_CARD` is
            missing.
    """
    from segrl.runs.schema.commands import Weights
    from segrl.runs.schema.walk import faults

    for key in _CARD:
        if OmegaConf.select(cfg, key) is None:
            raise ValueError(f"ckpt: {path} must be a configuration of a run; it holds no {key}")
    parts: dict[str, Any] = {
        part: OmegaConf.to_container(cfg[part], resolve=True) for part in ("policy", "grammar", "head")
    }
    own = OmegaConf.create({**parts, "max_tokens": cfg.rollout.max_tokens})
    if found := faults(own, Weights, set()):
        raise ValueError(f"ckpt: {path} must be a configuration of segrl: {found[0]}")
    return own


def described(cfg: DictConfig, head_checkpoint: str | None) -> dict[str, dict[str, Any]]:
    """Return the parts that `segrl.json` describes, without paths of this machine.

    Args:
        cfg: saved configuration of the run, unresolved.
        head_checkpoint: see `export_policy`.
    """
    parts = {
        part: dict(OmegaConf.to_container(cfg[part], resolve=False))  # type: ignore[arg-type]
        for part in ("policy", "grammar", "head", "rollout")
    }
    parts["grammar"].pop("instructions", None)  # `export_policy` adds the texts
    parts["policy"] |= {"weights": ".", "lora": None}  # an adapter is merged into the weights
    # In place of the engine of the training, which may need vLLM or servers.
    parts["rollout"] = {
        "_target_": "segrl.rollout.shared_prefix.SharedPrefixEngine", "max_tokens": cfg.rollout.max_tokens
    }  # fmt: skip
    parts["precision"] = {"passes": str(cfg.trainer.precision)}
    head = parts["head"]
    head["embeddings_folder"] = None
    head["architecture"] = _named(str(head["architecture"]))
    head["checkpoint"] = head_checkpoint or _named(str(head["checkpoint"]))
    return parts


def _named(path: str) -> str:
    """Return `asset:NAME` for a file of segrl, a configuration of sam2 unchanged, else `weights:NAME`."""
    name = path.removeprefix("${asset:").removesuffix("}")
    if path != name or Path(path) == Path(asset(Path(path).name)):
        return f"asset:{Path(name).name}"
    return path if path.startswith("configs/") else f"weights:{Path(path).name}"


def _asked(policy: HFPolicy, grammar: Grammar, loader: str) -> str:
    """Return Markdown with the chat text that precedes a completion, for each of the loader's `_QUERIES`."""
    side = policy.encoder.image_side
    squashed = "" if side is None else f", with the image resized to {side}x{side} (bicubic)"
    told = []
    for query in _QUERIES.get(loader.rpartition(".")[2], (None,)):
        chat: str = policy.encoder.processor.apply_chat_template(
            grammar.messages(query), tokenize=False, add_generation_prompt=True
        )
        what = "What it is asked" if query is None else "What it is asked about a QUERY"
        told.append(f"{what}{squashed}:\n\n```\n{chat.strip()}\n```\n")
    return "\n".join(told)


def card(run: Path, note: str, ckpt: Path | None = None, asked: str = "", licence: str | None = None) -> str:
    """Return a model card in Markdown: front matter, note, licence, scores, command, chat, configuration.

    Args:
        run: run folder.
        note: first paragraph.
        ckpt: exported checkpoint of a policy; None for the card of a mask head.
        asked: paragraphs about the policy's chat text.
        licence: see `export_policy`.

    Raises:
        ValueError: naming a file of the run that is damaged.
    """
    folder = RunFolder(run)
    loaded = read(folder.config, "ckpt")
    config: Any = OmegaConf.to_container(loaded)  # unresolved: references to `paths` stay references
    wanted = ("stage", "rollout", "reward", "data", "trainer", "policy_precision")
    settings = OmegaConf.to_yaml(OmegaConf.create({k: config[k] for k in wanted if k in config}))
    front, terms = ({"license": licence}, "") if licence is not None else licences.of(loaded)
    if ckpt is None:
        front["pipeline_tag"] = "image-segmentation"
    else:
        front |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    head = OmegaConf.to_yaml(OmegaConf.create(front))
    lines = [f"---\n{head}---\n# {config['name']}\n\n{note}\n{terms and chr(10) + terms + chr(10)}"]
    if ckpt is not None and not _scored(run, ckpt):
        lines.append(
            f"Trained by segrl. This checkpoint, `{ckpt.name}`, has not been scored: "
            "the run's scores are those of another checkpoint."
        )
    elif folder.finished:
        metrics = read_json(folder.metrics, "ckpt", "name", "seed", "steps", "seconds", "metrics")
        numbers = (
            [*metrics["metrics"].values(), metrics["seconds"]]
            if isinstance(metrics["metrics"], dict)
            else [None]
        )
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(
                f"ckpt: {folder.metrics} must hold a number for every metric; got {metrics['metrics']!r:.80}"
            )
        lines.append(
            f"Trained by segrl, experiment `{metrics['name']}`, seed {metrics['seed']}, "
            f"{metrics['steps']} updates, {metrics['seconds']:.0f} s.\n\n| metric | value |\n|---|---|"
        )
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics["metrics"].items()]
    if folder.provenance.is_file():
        made = read_json(folder.provenance, "ckpt", "command", "git.commit", "git.dirty")
        dirty = ", with uncommitted changes" if made["git.dirty"] == "true" else ""
        lines.append(
            f"\n```\n{made['command']}\n```\ncommit {made['git.commit']}{dirty}; data: {_data(loaded)}"
        )
    return "\n".join(lines) + (
        f"\n\n{asked}\n<details><summary>configuration</summary>\n\n```yaml\n{settings}```\n</details>\n"
    )


def _scored(run: Path, ckpt: Path) -> bool:
    """Return whether the scores in the run's metrics.json are those of this checkpoint."""
    from segrl.tracking.checkpoints import read_checkpoint

    folder = RunFolder(run)
    if not folder.finished:
        return False
    metrics = read_json(folder.metrics, "ckpt", "steps")
    if ckpt.resolve() != folder.scored.resolve():
        return False
    if "scored_step" not in metrics and ckpt.name == folder.best.name:  # an old run, without that key
        return True
    return bool(read_checkpoint(ckpt, "ckpt")["global_step"] == metrics.get("scored_step", metrics["steps"]))


def _data(cfg: DictConfig) -> str:
    """Return the training data of a run, with its licence."""
    loader = str(OmegaConf.select(cfg, "data.module.train._target_")).rpartition(".")[2]
    data: Any = OmegaConf.to_container(cfg.data)
    return (
        f"`{loader}` of {data.get('root', 'scenes drawn by segrl')} "
        f"({OmegaConf.select(cfg, 'data.licence', default='no licence stated')})"
    )
