"""DeepSpeed's ZeRO under Lightning: DDP's semantics and DDP's checkpoints, with the state shared out over the ranks.

Lightning's own DeepSpeed strategy writes folders of shards, clips gradients by itself and refuses a CPU. Here the engine
does only what nothing else can: it shares out the optimizer's state (ZeRO-1), the gradients (ZeRO-2) and the weights
(ZeRO-3). A checkpoint is the one file that every strategy writes, and can be resumed under any of them.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn


def _leave_group() -> None:
    """Before every run's own: nothing frees the engine, which keeps its groups' threads; a second is a margin for them to let go of the last tensors."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(1)


class ZeRO(DDPStrategy):
    """Zero Redundancy Optimizer (Rajbhandari et al., SC 2020).

    Args:
        zero_stage: 1 shares out the optimizer's state, 2 the gradients as well, 3 the weights as well.

    Raises:
        ValueError: if `zero_stage` is another, or DeepSpeed is not installed.
    """

    def __init__(self, zero_stage: int) -> None:
        if zero_stage not in (1, 2, 3):
            raise ValueError(f"trainer.strategy.zero_stage: 1, 2 or 3 is needed; got {zero_stage}")
        if find_spec("deepspeed") is None:
            raise ValueError(
                "trainer: DeepSpeed is needed for ZeRO; install it with `uv sync --extra deepspeed`"
            )
        super().__init__()
        self.zero_stage = zero_stage
        self.engine: Any = None
        self.groups: list[list[nn.Parameter]] = []

    def setup(self, trainer: lightning.Trainer) -> None:
        """As DDP's; for training, with the engine in place of DDP's wrapper."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        import deepspeed

        atexit.register(_leave_group)
        (optimizer,) = self.optimizers
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.engine, *_ = deepspeed.initialize(
            model=self.lightning_module,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # of its own timers; ours is the stage's
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": self.zero_stage},
            },
        )

    def configure_ddp(self) -> None:
        """No wrapper: the engine exchanges the gradients."""
        self.model = self.lightning_module

    def backward(
        self, closure_loss: Tensor, optimizer: torch.optim.Optimizer | None, *_: object, **__: object
    ) -> Tensor:
        """Through the engine."""
        self.engine.optimizer.clear_backward_seen_flag()  # as its own forward would: a new part, which adds to the last
        self.engine.backward(closure_loss)
        return closure_loss

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Inside, gradients add up; the next backward pass outside ends the update."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], object], *_: object, **__: object
    ) -> object:
        """Of the engine, which holds the optimizer's shares."""
        value = closure()
        self.engine.step()
        return value

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, of shared-out gradients: each is gathered once, or twice if they are too long."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        parameters = list(parameters)
        norm = torch.stack([safe_get_full_grad(p).float().norm() for p in parameters]).norm()
        if norm > max_norm:
            for parameter in parameters:
                safe_set_full_grad(parameter, safe_get_full_grad(parameter) * (max_norm / (norm + 1e-6)))
        return norm

    @contextmanager
    def whole_weights(self, *modules: nn.Module) -> Generator[None, None, None]:
        """Gather the weights of these modules on every rank; inside, a rank may read them as often as it likes.

        Ranks sample different lengths, so a gather per layer and pass would wait for calls that never come.
        """
        if self.zero_stage < 3 or self.engine is None:
            yield
            return
        import deepspeed

        offload = self.engine.optimizer.parameter_offload
        gathered = dict.fromkeys(p for module in modules for p in module.parameters())  # each once, in order
        with deepspeed.zero.GatheredParameters(list(gathered)):
            offload.destroy()  # its hooks would release weights again, and expect every rank to call the same modules
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What the optimizer would hold without shares: torch's own format, on the CPU of the first rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        sharing = self.engine.optimizer.optimizer
        held: dict[str, Tensor] = next(iter(sharing.state.values()), {})
        state: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(p for group in self.groups for p in group if held):
            whole = {
                name: value.clone() if value.dim() == 0 else safe_get_full_optimizer_state(parameter, name)
                for name, value in held.items()
            }
            if self.is_global_zero:
                state[number] = {name: value.to("cpu", copy=True) for name, value in whole.items()}
        numbers, groups = iter(range(10**9)), []
        for shared, members in zip(sharing.param_groups, self.groups, strict=True):
            kept = {name: value for name, value in shared.items() if name != "params"}
            groups.append({**kept, "params": [next(numbers) for _ in members]})
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Share out what `optimizer_state`, or any other strategy, has saved."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (saved,) = checkpoint["optimizer_states"]
        sharing = self.engine.optimizer.optimizer
        held: dict[str, Tensor] = next(iter(saved["state"].values()), {})
        for group, old in zip(sharing.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in old.items() if name != "params"})
        flat = "fp32_partitioned_groups_flat" if self.zero_stage == 3 else "single_partition_of_fp32_groups"
        for share in getattr(self.engine.optimizer, flat):
            for name, value in held.items():
                sharing.state[share][name] = (
                    value.to(share.device, copy=True) if value.dim() == 0 else torch.zeros_like(share)
                )
        if held and self.zero_stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()  # its shares learn of their new state
        for number, parameter in enumerate(p for group in self.groups for p in group):
            for name, value in saved["state"].get(number, {}).items():
                if value.dim():
                    safe_set_full_optimizer_state(parameter, value.to(self.root_device), name)

    def on_exception(self, exception: BaseException) -> None:
        """A rank that fails gathers nothing more: the others may have failed, too, or wait elsewhere."""
        self.engine = None
        super().on_exception(exception)

    def teardown(self) -> None:
        """Every rank has whole weights again, for the tests that follow."""
        if self.engine is not None:
            assert self.lightning_module is not None, "the engine was made of it"
            if self.zero_stage == 3:
                for parameter in self.lightning_module.parameters():
                    cast("Any", parameter).all_gather()
            self.engine.destroy()
            self.engine = None
        super().teardown()
