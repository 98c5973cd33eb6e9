"""Write a trained policy as a Hugging Face folder, with `segrl.json` and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from segrl.runs import licences
from segrl.runs.configuration import asset
from segrl.runs.folder import check_kinds, read_json, scored_checkpoint
from segrl.runs.resuming import read

if TYPE_CHECKING:
    from segrl.models.hf_vlm import HFPolicy
    from segrl.protocols import Grammar

# By loader, the queries that a card shows: its samples have one each, or may; those of others have none.
_QUERIES: dict[str, tuple[str | None, ...]] = {
    "ReferringExpressions": ("QUERY",), "ReasonSeg": ("QUERY",), "Listed": (None, "QUERY"),
}  # fmt: skip
# Keys that a card, or `segrl.json`, is written from.
_CARD = (
    "name", "policy._target_", "grammar._target_", "head._target_", "stage._target_", "reward", "rollout.max_tokens",
    "trainer.precision", "data.module.train._target_", "policy.weights",
)  # fmt: skip


def export_policy(
    ckpt: Path, out: Path, note: str, head_checkpoint: str | None = None, licence: str | None = None
) -> None:
    """Write the policy of a checkpoint as weights, processor, generation config, instructions, `segrl.json` and model card.

    Args:
        ckpt: in the `checkpoints` folder of a run.
        out: folder to write.
        note: first paragraph of the model card.
        head_checkpoint: of the mask head, as `segrl.json` names it; None takes the run's.
        licence: of the weights, for whoever owns them; None says what follows from the base model and the data.

    Raises:
        ValueError: if `ckpt` is no checkpoint of a run, or holds no policy.
    """
    from hydra.utils import instantiate

    from segrl.models import policy_card
    from segrl.prompts import instructions
    from segrl.tracking.checkpoints import learned_policy

    run = ckpt.parent.parent
    if not ckpt.is_file():
        raise ValueError(
            f"ckpt: a checkpoint is needed; {ckpt} is {'a folder' if ckpt.is_dir() else 'not there'}"
        )
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"ckpt: a checkpoint in a run's folder is needed, RUN/checkpoints/last.ckpt; two folders above {ckpt} is no config.yaml of a run"
        )
    check_kinds(run, "ckpt")
    cfg = read(run / "config.yaml", "ckpt")
    own = _own(cfg, run / "config.yaml")
    learned = learned_policy(ckpt, "ckpt")
    parts = policy_card.checked(described(cfg, head_checkpoint), run / "config.yaml")
    grammar = instantiate(own.grammar)
    parts["grammar"]["instructions"] = {grammar.section: grammar.texts}  # the texts, not where they stood
    policy = instantiate(own.policy)
    policy.take_over(learned)
    asked = _asked(policy, grammar, str(cfg.data.module.train._target_))
    text = card(run, note, ckpt, asked, licence)
    policy.save(out, own.max_tokens)
    # Of the other grammars, too, where the run was given them
    given = OmegaConf.select(own, "grammar.instructions")
    others: Any = OmegaConf.to_container(given) if isinstance(given, DictConfig) else {}
    beside = instructions.written({**others, grammar.section: grammar.texts})
    (out / instructions.NAME).write_text(beside, encoding="utf-8")
    policy_card.write(out, parts)  # and the digests of all that is there by now
    (out / "README.md").write_text(text)


def _own(cfg: DictConfig, path: Path) -> DictConfig:
    """Return, without references, what is made of a run's configuration, which may come from anyone; the rest is only described.

    Raises:
        ValueError: if that names anything but segrl's parts and plain values, or the card's part of the rest is not there.
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
    """What stands around the weights, as `segrl.json` says it: no path of one machine."""
    parts = {
        part: dict(OmegaConf.to_container(cfg[part], resolve=False))  # type: ignore[arg-type]
        for part in ("policy", "grammar", "head", "rollout")
    }
    parts["grammar"].pop("instructions", None)  # whoever writes the card knows the texts
    parts["policy"] |= {"weights": ".", "lora": None}  # an adapter was merged
    parts["rollout"] = {  # whatever sampled in training: it needs no more than segrl itself
        "_target_": "segrl.rollout.shared_prefix.SharedPrefixEngine", "max_tokens": cfg.rollout.max_tokens
    }  # fmt: skip
    parts["precision"] = {"passes": str(cfg.trainer.precision)}
    head = parts["head"]
    head["embeddings_folder"] = None
    head["architecture"] = _named(str(head["architecture"]))
    head["checkpoint"] = head_checkpoint or _named(str(head["checkpoint"]))
    return parts


def _named(path: str) -> str:
    """A file that ships with segrl or with sam2, or one of the folder of weights, by its name."""
    name = path.removeprefix("${asset:").removesuffix("}")
    if path != name or Path(path) == Path(asset(Path(path).name)):
        return f"asset:{Path(name).name}"
    return path if path.startswith("configs/") else f"weights:{Path(path).name}"


def _asked(policy: HFPolicy, grammar: Grammar, loader: str) -> str:
    """The text in front of a completion, for other tools; with a query only where it was trained with some."""
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
    """Return Markdown: what it is and is asked, its licence, data, command, scores and configuration.

    Args:
        run: run folder.
        note: first paragraph.
        ckpt: what is exported of a policy; None where the card is of a mask head.
        asked: paragraphs about what a policy is asked.
        licence: see `export_policy`.
    """
    loaded = read(run / "config.yaml", "ckpt")
    config: Any = OmegaConf.to_container(loaded)  # unresolved: no path of one machine
    wanted = ("stage", "rollout", "reward", "data", "trainer")
    settings = OmegaConf.to_yaml(OmegaConf.create({k: config[k] for k in wanted}))
    front, terms = ({"license": licence}, "") if licence is not None else licences.of(loaded)
    if ckpt is None:
        front["pipeline_tag"] = "image-segmentation"
    else:
        front |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    head = OmegaConf.to_yaml(OmegaConf.create(front))
    lines = [f"---\n{head}---\n# {config['name']}\n\n{note}\n{terms and chr(10) + terms + chr(10)}"]
    if ckpt is not None and not _scored(run, ckpt):
        lines.append(
            f"Trained by segrl. This checkpoint, `{ckpt.name}`, has not been scored: the run's scores are of another."
        )
    elif (run / "metrics.json").is_file():
        metrics = read_json(run / "metrics.json", "ckpt", "name", "seed", "steps", "seconds", "metrics")
        numbers = (
            [*metrics["metrics"].values(), metrics["seconds"]]
            if isinstance(metrics["metrics"], dict)
            else [None]
        )
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(
                f"ckpt: {run / 'metrics.json'} must hold a number for every metric; got {metrics['metrics']!r:.80}"
            )
        lines.append(
            f"Trained by segrl, experiment `{metrics['name']}`, seed {metrics['seed']}, {metrics['steps']} updates, "
            f"{metrics['seconds']:.0f} s.\n\n| metric | value |\n|---|---|"
        )
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics["metrics"].items()]
    if (run / "provenance.json").is_file():
        made = read_json(run / "provenance.json", "ckpt", "command", "git.commit", "git.dirty")
        dirty = ", with changes" if made["git.dirty"] == "true" else ""
        lines.append(
            f"\n```\n{made['command']}\n```\ncommit {made['git.commit']}{dirty}; data: {_data(loaded)}"
        )
    return "\n".join(lines) + (
        f"\n\n{asked}\n<details><summary>configuration</summary>\n\n```yaml\n{settings}```\n</details>\n"
    )


def _scored(run: Path, ckpt: Path) -> bool:
    """Whether the run's scores are those of this checkpoint."""
    from segrl.tracking.checkpoints import read_checkpoint

    if not (run / "metrics.json").is_file():
        return False
    metrics = read_json(run / "metrics.json", "ckpt", "steps")
    if ckpt.resolve() != scored_checkpoint(run).resolve():
        return False
    if "scored_step" not in metrics and ckpt.name == "best.ckpt":  # of a run from before, which did not say
        return True
    return bool(read_checkpoint(ckpt, "ckpt")["global_step"] == metrics.get("scored_step", metrics["steps"]))


def _data(cfg: DictConfig) -> str:
    """What it learned from, and under which terms."""
    loader = str(OmegaConf.select(cfg, "data.module.train._target_")).rpartition(".")[2]
    data: Any = OmegaConf.to_container(cfg.data)
    return f"`{loader}` of {data.get('root', 'scenes drawn by segrl')} ({data.get('licence', 'no licence stated')})"
