"""The base classes of all stages: optimizer, noise, small checkpoints, and evaluation by segmenting."""

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
from segrl.metrics.parts import RunningMeans
from segrl.metrics.saliency import NAMES, brief
from segrl.protocols import Grammar, Sharding, TrainablePolicy
from segrl.segmenter import Segmenter
from segrl.stages.unsharded import UNSHARDED
from segrl.types import Answer, Batch

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


class MakeSchedule(Protocol):
    """A function that makes a learning rate schedule, which is stepped once per update."""

    def __call__(
        self, optimizer: torch.optim.Optimizer, *, total_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the schedule of a run of `total_steps` updates."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """How gradients become updates.

    Attributes:
        optimizer: makes the optimizer from the parameters that are trained.
        schedule: makes its learning rate schedule. If None, the rate is constant.
        max_grad_norm: L2 norm to which gradients are clipped.
    """

    optimizer: MakeOptimizer
    schedule: MakeSchedule | None
    max_grad_norm: float


class Stage(lightning.LightningModule):
    """A way of training: optimizer, noise and small checkpoints.

    Everything random in a step is a function of (seed, step, place in the step). So a checkpoint holds no
    generator's state, and a resumed run repeats what the killed run would have done.

    Args:
        optimization: optimizer, schedule and clipping.
        seed: of the run.

    Attributes:
        frozen: prefixes of the names of parameters that never enter a checkpoint.
        latest: scalars logged by the last update.
        sampled: completions sampled so far, by all ranks.
        started_from: checkpoint from which the run starts; a checkpoint records it.
        keep_frozen: whether checkpoints also hold parameters that are not trained.
        collate: makes training batches.
        eval_collate: makes validation and test batches.
    """

    frozen: tuple[str, ...] = ()

    def __init__(self, *, optimization: Optimization, seed: int) -> None:
        super().__init__()
        self.optimization, self.seed = optimization, seed
        self.strict_loading = False
        self.latest: dict[str, float] = {}
        self.sampled = 0
        self.started_from: str | None = None
        self.keep_frozen = False
        self.collate = self.eval_collate = Collate(None, None)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """Return the optimizer of all parameters that are trained, with its schedule."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return self.scheduled(self.optimization.optimizer(trained))

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:  # noqa: ANN401 - Lightning's own union
        """Return the optimizer with its schedule, if there is one.

        Raises:
            ValueError: if the schedule cannot be made, or replaces a parameter group's own learning rate.
        """
        if self.optimization.schedule is None:
            return optimizer
        own = [group["lr"] for group in optimizer.param_groups]
        try:
            schedule = self.optimization.schedule(optimizer, total_steps=self.total_updates)
        except (ValueError, ArithmeticError) as fault:
            raise ValueError(
                f"stage.schedule: must fit the run's {self.total_updates} updates; it cannot be made "
                f"({fault}); change its keys or trainer.max_steps"
            ) from fault
        peaks = [group.get("max_lr", lr) for group, lr in zip(optimizer.param_groups, own, strict=True)]
        if peaks != own:
            raise ValueError(
                f"stage.schedule: must peak at stage.optimizer.lr and at the rates of other groups, {own}; "
                f"it sets {peaks} (segrl.stages.schedule.one_cycle takes them as they are)"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def updates_per_batch(self) -> int:
        """Number of optimizer steps that one batch of samples makes."""
        return 1

    @property
    def total_updates(self) -> int:
        """Number of updates of the whole run.

        Lightning's estimate counts batches, unless `trainer.max_steps` ends the run.
        """
        batches, most = int(self.trainer.estimated_stepping_batches), self.trainer.max_steps
        if batches == most:
            return most
        return batches * self.updates_per_batch if most < 0 else min(most, batches * self.updates_per_batch)

    @property
    def sharding(self) -> Sharding:
        """The trainer's strategy if it shards training state, else one that does what torch does."""
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, Sharding) else UNSHARDED

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clip gradients to `max_grad_norm` and return the norm before clipping, over all shards."""
        return self.sharding.clip(parameters, self.optimization.max_grad_norm)

    def configure_gradient_clipping(self, *_: object, **__: object) -> None:
        """Clip the gradients of all trained parameters."""
        self.clip(p for p in self.parameters() if p.requires_grad)

    def whole_weights(self, *parts: object) -> AbstractContextManager[None]:
        """Return a context in which every rank holds the whole weights of `parts` that are modules."""
        return self.sharding.whole_weights(*(part for part in parts if isinstance(part, nn.Module)))

    def checkpointed(self) -> list[nn.Module]:
        """Return the modules whose weights a checkpoint may hold."""
        return [module for name, module in self.named_children() if f"{name}." not in self.frozen]

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a part of an update; ranks exchange gradients only in its last part."""
        strategy = self.trainer.strategy
        exchanges = last or not isinstance(strategy, ParallelStrategy)
        with nullcontext() if exchanges else cast("ParallelStrategy", strategy).block_backward_sync():
            self.manual_backward(loss)

    @property
    def datamodule(self) -> SegDataModule:
        """The datamodule of this run."""
        return cast("SegDataModule", self.trainer.datamodule)  # type: ignore[attr-defined]

    def noise_seed(self, *keys: int) -> int:
        """Return a seed that is a function of the run's seed, the update and `keys`."""
        return int(np.random.SeedSequence([self.seed, self.global_step, *keys]).generate_state(1)[0])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the global generator, so that what draws from it (dropout) repeats itself after a resume."""
        torch.manual_seed(self.noise_seed(self.global_rank))

    def step(self, optimizer: LightningOptimizer) -> None:
        """Clip the gradients, update the weights, and step the schedule."""
        self.configure_gradient_clipping()
        optimizer.step()
        self.after_step()

    def after_step(self) -> None:
        """Step the schedule, if there is one."""
        if (schedule := self.lr_schedulers()) is not None:
            cast("torch.optim.lr_scheduler.LRScheduler", schedule).step()

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the mean of a value over the ranks, float32."""
        return cast("Tensor", self.trainer.strategy.reduce(value.float(), reduce_op="mean"))

    def remember(self, scalars: dict[str, Tensor | float]) -> None:
        """Log scalars of this step, as their means over the ranks; their names are API."""
        values = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in scalars.values()]
        )
        self.latest = dict(zip(scalars, self.over_ranks(values).tolist(), strict=True))
        self.log_dict(self.latest, on_step=True, on_epoch=False)

    def _learned(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint holds, by name."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        left_out = set() if self.keep_frozen else frozen
        return {
            k: v
            for k, v in self.state_dict().items()
            if k not in left_out and not k.startswith(self.frozen or ("\0",))
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only weights that are trained: frozen ones are loaded from their own files."""
        with self.whole_weights(*self.checkpointed()):
            checkpoint["state_dict"] = {k: v.to("cpu", copy=True) for k, v in self._learned().items()}
        checkpoint["stage"] = type(self).__name__
        checkpoint["init_from"], checkpoint["total_updates"] = self.started_from, self.total_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError naming the first weight whose shape differs, or a schedule of another length."""
        ours, theirs = self._learned(), checkpoint["state_dict"]
        for name in sorted(set(ours) | set(theirs)):
            mine = tuple(ours[name].shape) if name in ours else "missing"
            other = tuple(theirs[name].shape) if name in theirs else "missing"
            if mine != other:
                raise ValueError(
                    f"ckpt_path, or resume: must be a checkpoint of this stage and policy; "
                    f"the weight {name} is {other} in the checkpoint, {mine} in this run"
                )
        planned = checkpoint.get("total_updates")
        if (
            self._trainer is not None
            and self.optimization.schedule is not None
            and planned != self.total_updates
        ):
            raise ValueError(
                f"stage.schedule: must be laid over as many updates as before, {planned}; "
                f"this run would make {self.total_updates}: keep trainer.max_steps and max_epochs, "
                "or set stage.schedule=null from the start"
            )


class SegStage(Stage):
    """A stage that trains a policy and evaluates it by segmenting.

    Args:
        segmenter: the policy that is trained (a `TrainablePolicy` and a module), with its grammar, engine and
            mask head.
        optimization, seed: see `Stage`.
        trace: writes the completions to imitate; None for stages that sample completions.
        also: further grammars to imitate; see `data.collate.Collate`.
    """

    frozen: tuple[str, ...] = ("head.",)

    def __init__(
        self,
        *,
        segmenter: Segmenter,
        optimization: Optimization,
        seed: int,
        trace: Trace | None = None,
        also: Sequence[Grammar] = (),
    ) -> None:
        super().__init__(optimization=optimization, seed=seed)
        if not isinstance(segmenter.policy, TrainablePolicy):
            raise ValueError(
                f"policy: must satisfy segrl.protocols.TrainablePolicy; "
                f"{type(segmenter.policy).__name__} does not"
            )
        self.segmenter = segmenter
        self.policy, self.head = segmenter.policy, segmenter.head
        self.grammar, self.engine = segmenter.grammar, segmenter.engine
        self.collate = Collate(self.policy.encoder, self.grammar, trace, also)
        self.eval_collate = Collate(self.policy.encoder, self.grammar)
        self.val_scores: dict[str, RunningMeans] = {}

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Load the policy of an earlier stage. Raise ValueError if its architecture differs."""
        self.policy.load_policy(weights)
        self.keep_frozen = True  # parameters that are not trained may differ from policy.weights

    def after_step(self) -> None:
        """Step the schedule and the policy's weights version."""
        super().after_step()
        self.policy.bump_version()

    def evaluate_batch(self, batch: Batch) -> list[Answer]:
        """Return the greedy answer to each sample of a batch."""
        with self.whole_weights(self.policy, self.head):
            return self.segmenter(batch)

    def on_validation_epoch_start(self) -> None:
        """Reset the totals."""
        self.val_scores = {
            name: RunningMeans(dict.fromkeys(NAMES, 1)).to(self.device) for name in self.datamodule.val
        }

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the scores of a batch to the totals of its dataset."""
        totals = self.val_scores[list(self.val_scores)[dataloader_idx]]
        for answer, sample in zip(self.evaluate_batch(batch), batch.samples, strict=True):
            totals.update(brief(answer, sample))

    def on_validation_epoch_end(self) -> None:
        """Log `val/<dataset>/<metric>`."""
        for name, scores in self.val_scores.items():
            for metric, value in scores.compute().items():
                self.log(f"val/{name}/{metric}", value.squeeze(), rank_zero_only=True)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Answer]]:
        """Return the answers under "answers"; a callback scores and writes them."""
        return {"answers": self.evaluate_batch(batch)}
