"""What all ways of training share: optimizer, noise, lean checkpoints, and evaluation by segmenting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from segrl.data.collate import Collate, Trace
from segrl.data.datamodule import SegDataModule
from segrl.metrics.parts import SetMeans
from segrl.metrics.saliency import NAMES, score
from segrl.models.hf_vlm import HFPolicy
from segrl.protocols import Grammar, MaskHead, RolloutEngine
from segrl.segmenter import Segmenter
from segrl.stages.zero import ZeRO
from segrl.types import Answer, Batch, Sample

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


class MakeSchedule(Protocol):
    """Builds a learning rate schedule that is stepped once per update."""

    def __call__(
        self, optimizer: torch.optim.Optimizer, *, total_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of a run of `total_steps` updates."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One evaluated sample."""

    sample: Sample
    answer: Answer
    scores: dict[str, float]


class Stage(lightning.LightningModule):
    """Optimizer, noise and lean checkpoints.

    Whatever is random in a step is a function of (seed, step, place in it), so a checkpoint needs no generator's state,
    and a resumed run repeats what the killed one would have done.

    Args:
        optimizer: makes the optimizer from the parameters that learn.
        schedule: makes its schedule; none keeps the learning rate.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of the run.
    """

    frozen: tuple[str, ...] = ()
    """Prefixes of parameters that never enter a checkpoint."""

    def __init__(
        self, optimizer: MakeOptimizer, schedule: MakeSchedule | None, max_grad_norm: float, seed: int
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.strict_loading = False
        self.latest: dict[str, float] = {}
        self.sampled = 0
        self.started_from: str | None = None
        self.keep_frozen = False
        self.collate = self.eval_collate = Collate(None, None)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """Over the parameters that learn."""
        return self.scheduled(self.make_optimizer([p for p in self.parameters() if p.requires_grad]))

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:  # noqa: ANN401 - Lightning's own union
        """Return the optimizer with its schedule, if there is one.

        Raises:
            ValueError: if the schedule cannot be made, or puts another peak in place of a group's own learning rate.
        """
        if self.make_schedule is None:
            return optimizer
        own = [group["lr"] for group in optimizer.param_groups]
        try:
            schedule = self.make_schedule(optimizer, total_steps=self.total_updates)
        except (ValueError, ArithmeticError) as fault:
            raise ValueError(
                f"stage.schedule: it cannot be laid over the run's {self.total_updates} updates ({fault}); "
                f"change its keys or trainer.max_steps"
            ) from fault
        peaks = [group.get("max_lr", lr) for group, lr in zip(optimizer.param_groups, own, strict=True)]
        if peaks != own:
            raise ValueError(
                f"stage.schedule: it must peak at stage.optimizer.lr and at the rates of other groups, {own}; it sets {peaks} "
                "(segrl.stages.schedule.one_cycle takes them as they are)"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps that one batch of samples makes."""
        return 1

    @property
    def total_updates(self) -> int:
        """Of the whole run. Lightning counts batches, except where `trainer.max_steps` ends the run."""
        batches, most = int(self.trainer.estimated_stepping_batches), self.trainer.max_steps
        if batches == most:
            return most
        return batches * self.updates_per_batch if most < 0 else min(most, batches * self.updates_per_batch)

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Scale gradients down to `max_grad_norm`, wherever their shares lie; the norm that they had."""
        strategy = self.trainer.strategy
        clip = strategy.clip if isinstance(strategy, ZeRO) else torch.nn.utils.clip_grad_norm_
        return clip(parameters, self.max_grad_norm)

    def configure_gradient_clipping(self, *_: object, **__: object) -> None:
        """Of all that learns."""
        self.clip(p for p in self.parameters() if p.requires_grad)

    def whole_weights(self, *parts: object) -> AbstractContextManager[None]:
        """Return a context in which every rank has the whole weights of these parts, however training shards them."""
        strategy, modules = self.trainer.strategy, [part for part in parts if isinstance(part, nn.Module)]
        return strategy.whole_weights(*modules) if isinstance(strategy, ZeRO) else nullcontext()

    def checkpointed(self) -> list[nn.Module]:
        """Return the modules whose weights a checkpoint may hold."""
        return [module for name, module in self.named_children() if f"{name}." not in self.frozen]

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Add to the gradients of an update; ranks exchange them once, in its last part."""
        strategy = self.trainer.strategy
        alone = last or not isinstance(strategy, ParallelStrategy)
        with nullcontext() if alone else cast("ParallelStrategy", strategy).block_backward_sync():
            self.manual_backward(loss)

    @property
    def datamodule(self) -> SegDataModule:
        """Of this run."""
        return cast("SegDataModule", self.trainer.datamodule)  # type: ignore[attr-defined]

    def noise_seed(self, *keys: int) -> int:
        """Of this step, and of whatever in it the keys number."""
        return int(np.random.SeedSequence([self.seed, self.global_step, *keys]).generate_state(1)[0])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Whatever draws from the global generator (dropout) repeats itself after a resume, too."""
        torch.manual_seed(self.noise_seed(self.global_rank))

    def step(self, optimizer: LightningOptimizer) -> None:
        """Scale gradients down to `max_grad_norm`, update, and move the schedule."""
        self.configure_gradient_clipping()
        optimizer.step()
        self.after_step()

    def after_step(self) -> None:
        """Move the schedule, if there is one."""
        if (schedule := self.lr_schedulers()) is not None:
            cast("torch.optim.lr_scheduler.LRScheduler", schedule).step()

    def over_ranks(self, value: Tensor) -> Tensor:
        """Mean over the ranks."""
        return cast("Tensor", self.trainer.strategy.reduce(value.float(), reduce_op="mean"))

    def remember(self, scalars: dict[str, Tensor | float]) -> None:
        """Log scalars of this step, as their means over the ranks; their names are API."""
        values = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in scalars.values()]
        )
        self.latest = dict(zip(scalars, self.over_ranks(values).tolist(), strict=True))
        self.log_dict(self.latest, on_step=True, on_epoch=False)

    def _learned(self) -> dict[str, Tensor]:
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        still = set() if self.keep_frozen else frozen
        return {
            k: v
            for k, v in self.state_dict().items()
            if k not in still and not k.startswith(self.frozen or ("\0",))
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen: it is rebuilt from its own files."""
        with self.whole_weights(*self.checkpointed()):
            checkpoint["state_dict"] = {k: v.to("cpu", copy=True) for k, v in self._learned().items()}
        checkpoint["stage"] = type(self).__name__
        checkpoint["init_from"], checkpoint["total_updates"] = self.started_from, self.total_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another architecture; raises ValueError naming the first difference."""
        ours, theirs = self._learned(), checkpoint["state_dict"]
        for name in sorted(set(ours) | set(theirs)):
            mine = tuple(ours[name].shape) if name in ours else "missing"
            other = tuple(theirs[name].shape) if name in theirs else "missing"
            if mine != other:
                raise ValueError(
                    f"ckpt_path, or resume: a checkpoint of this stage and policy is needed; the weight {name} is {other} in the "
                    f"checkpoint, {mine} in this run"
                )
        planned = checkpoint.get("total_updates")
        if self._trainer is not None and self.make_schedule is not None and planned != self.total_updates:
            raise ValueError(
                f"stage.schedule: it was made for {planned} updates, and this run would make {self.total_updates}: keep "
                "trainer.max_steps and max_epochs, or set stage.schedule=null from the start"
            )


class SegStage(Stage):
    """A stage that trains a policy, and is evaluated by segmenting.

    Args:
        policy, grammar, head, engine: see `protocols`.
        optimizer, schedule, max_grad_norm, seed: see `Stage`.
        trace: writes the answers to imitate, where the stage imitates.
        also: grammars that are imitated, too; see `data.batching.Collate`.
    """

    frozen: tuple[str, ...] = ("head.",)

    def __init__(
        self, policy: HFPolicy, grammar: Grammar, head: MaskHead, engine: RolloutEngine,
        optimizer: MakeOptimizer, schedule: MakeSchedule | None, max_grad_norm: float, seed: int,
        trace: Trace | None = None, also: Sequence[Grammar] = (),
    ) -> None:  # fmt: skip
        super().__init__(optimizer, schedule, max_grad_norm, seed)
        self.policy, self.grammar, self.head, self.engine = policy, grammar, head, engine
        self.segmenter = Segmenter(policy, grammar, engine, head)
        self.collate = Collate(policy.encoder, grammar, trace, also)
        self.eval_collate = Collate(policy.encoder, grammar)
        self.val_scores: dict[str, SetMeans] = {}
        self.records: dict[str, list[Record]] = {}

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over the policy of an earlier stage; raises ValueError if its architecture is another."""
        self.policy.load_policy(weights)
        self.keep_frozen = True  # what does not learn is no longer what policy.weights holds

    def after_step(self) -> None:
        """Move the schedule, and tell the policy that it has moved."""
        super().after_step()
        self.policy.bump_version()

    def evaluate_batch(self, batch: Batch) -> list[Record]:
        """Segment a batch and score it at the size of its masks."""
        with self.whole_weights(self.policy, self.head):
            answers = self.segmenter(batch)
        return [
            Record(sample=s, answer=a, scores=score(s.counted(a.mask), s.mask, a.parsed.fault is not None))
            for s, a in zip(batch.samples, answers, strict=True)
        ]

    def on_validation_epoch_start(self) -> None:
        """Fresh totals."""
        self.val_scores = {
            name: SetMeans(dict.fromkeys(NAMES, 1)).to(self.device) for name in self.datamodule.val
        }

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its dataset's totals."""
        name = list(self.val_scores)[dataloader_idx]
        for record in self.evaluate_batch(batch):
            self.val_scores[name].update({key: np.array([v]) for key, v in record.scores.items()})

    def on_validation_epoch_end(self) -> None:
        """Log `val/<dataset>/<metric>`."""
        for name, scores in self.val_scores.items():
            for metric, value in scores.compute().items():
                self.log(f"val/{name}/{metric}", value.squeeze(), rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        """Fresh records."""
        self.records = {name: [] for name in self.datamodule.test}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep one record per sample: what happens to them is the caller's business."""
        self.records[list(self.records)[dataloader_idx]] += self.evaluate_batch(batch)
