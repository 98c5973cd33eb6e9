"""Callbacks that print progress and write history and pictures while a stage trains."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning

from segrl.host.files import write_whole
from segrl.stages.base import Stage
from segrl.stages.policy_gradient import PolicyGradientStage
from segrl.tracking.figures import Cell, sheet
from segrl.tracking.run_folder import RunFolder

_SHOWN = ("reward/total", "sft/loss", "head/iou", "tower/box_loss")


class Progress(lightning.Callback):
    """Callback that prints update, headline scalars, share of unparsable completions and time left.

    Args:
        every_seconds: least time between lines.
    """

    def __init__(self, every_seconds: float) -> None:
        self.every_seconds = every_seconds
        self.began = self.told = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.began = self.told = time.monotonic()
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Print the line every `every_seconds` and at the last update, on the first rank."""
        if not isinstance(pl_module, Stage):
            return
        now, step, total = time.monotonic(), trainer.global_step, pl_module.total_updates
        if now - self.told < self.every_seconds and step < total:
            return
        self.told = now
        if not trainer.is_global_zero:
            return
        left = (now - self.began) / max(1, step - self.first_step) * (total - step)
        scalars = [f"{name} {pl_module.latest[name]:.3f}" for name in _SHOWN if name in pl_module.latest]
        if "rollout/fault_rate" in pl_module.latest:
            scalars.append(f"unparsable {pl_module.latest['rollout/fault_rate']:.0%}")
        print(f"  step {step}/{total}  {'  '.join(scalars)}  {left / 60:.1f} min left", flush=True)


class History(lightning.Callback):
    """Callback that writes the scalars of each update as a line of JSON.

    Args:
        folder: run folder, in which `history.jsonl` is written.
    """

    def __init__(self, folder: str) -> None:
        self.path = RunFolder(Path(folder)).history

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop lines beyond the checkpoint, which the killed run wrote."""
        if not trainer.is_global_zero:
            return
        kept = [line for line in read_history(self.path) if line["step"] <= trainer.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Append the scalars of the update."""
        if isinstance(pl_module, Stage) and trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": trainer.global_step, **pl_module.latest}) + "\n")


def cut_history(path: Path, step: int) -> str | None:
    """Return a message if a `history.jsonl` cannot be read up to the update `step`, else None."""
    if not path.is_file():
        return None
    last = max((int(line["step"]) for line in read_history(path)), default=0)
    if last >= step:
        return None
    return f"{path} must reach update {step}; it can be read up to {last}, and new updates are appended"


def read_history(path: Path) -> list[dict[str, float]]:
    """Return the lines of a `history.jsonl` up to the first unreadable one: a kill may truncate the last."""
    if not path.is_file():
        return []
    lines: list[dict[str, float]] = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not all(
            isinstance(v, int | float) for v in (line.get("step"), *line.values())
        ):
            break
        lines.append(line)
    return lines


class SampleSheets(lightning.Callback):
    """Callback that draws a rollout: one row per sample, its completions side by side, best first.

    At most 4 samples and 4 completions of each are drawn.

    Args:
        folder: folder in which `step_000050.png` and so on are written.
        every_n_steps: number of updates between sheets.
    """

    def __init__(self, folder: str, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.drawn_at = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object
    ) -> None:
        """Draw the last rollout every `every_n_steps` updates, on the first rank."""
        if not isinstance(pl_module, PolicyGradientStage) or pl_module.last_rollout is None:
            return
        if not trainer.is_global_zero:
            return
        if trainer.global_step // self.every_n_steps == self.drawn_at // self.every_n_steps:
            return
        self.drawn_at = trainer.global_step
        rollout = pl_module.last_rollout
        answers, scores, group = rollout.answers, rollout.scores, rollout.group_size
        rows = []
        for b, sample in enumerate(rollout.batch.samples[:4]):
            order = scores.total[b].argsort(descending=True)[:4].tolist()
            rows.append([
                Cell(
                    image=sample.image, truth=sample.mask, mask=answers[b * group + g].mask,
                    prompt=answers[b * group + g].parsed.prompt,
                    caption=f"reward {scores.total[b, g]:.2f}\n{answers[b * group + g].text}",
                )
                for g in order
            ])  # fmt: skip
        sheet(rows, self.folder / f"step_{trainer.global_step:06d}.png")
