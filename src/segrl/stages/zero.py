"""DeepSpeed's ZeRO under Lightning: updates and checkpoints as under DDP, with sharded training state.

Lightning's own DeepSpeed strategy writes folders of shards, clips gradients itself and refuses a CPU. Here
the engine only shards the optimizer's state (ZeRO-1), the gradients (ZeRO-2) and the weights (ZeRO-3). A
checkpoint is the one file that every strategy writes, and any strategy can resume from it.
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
    """Destroy the process groups before the run's own exit handler does.

    DeepSpeed's engine keeps references to the groups. The pause gives gloo's threads time to release their
    last tensors.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(1)


class ZeRO(DDPStrategy):
    """Zero Redundancy Optimizer (Rajbhandari et al., SC 2020); satisfies `protocols.Sharding`.

    Args:
        zero_stage: 1 shards the optimizer's state, 2 also the gradients, 3 also the weights.

    Raises:
        ValueError: if `zero_stage` is another number, or DeepSpeed is not installed.
    """

    early_graphs = False
    partial_updates = False  # its optimizer steps flat shards, whichever parameters have a gradient

    def __init__(self, zero_stage: int) -> None:
        if zero_stage not in (1, 2, 3):
            raise ValueError(f"trainer.strategy.zero_stage: must be 1, 2 or 3; got {zero_stage}")
        if find_spec("deepspeed") is None:
            raise ValueError(
                "trainer: DeepSpeed must be installed for ZeRO; it is not (uv sync --extra deepspeed)"
            )
        super().__init__()
        self.zero_stage = zero_stage
        self.split_groups = zero_stage < 3
        self.engine: Any = None
        self.groups: list[list[nn.Parameter]] = []

    def setup(self, trainer: lightning.Trainer) -> None:
        """Set up as DDP does; for training, wrap the module in DeepSpeed's engine instead of DDP."""
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
                "train_micro_batch_size_per_gpu": 1,  # only for its timers
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": self.zero_stage},
            },
        )

    def configure_ddp(self) -> None:
        """Add no wrapper: the engine exchanges the gradients."""
        self.model = self.lightning_module

    def backward(
        self, closure_loss: Tensor, optimizer: torch.optim.Optimizer | None, *_: object, **__: object
    ) -> Tensor:
        """Run the backward pass through the engine."""
        self.engine.optimizer.clear_backward_seen_flag()  # as its forward does; gradients add up
        self.engine.backward(closure_loss)
        return closure_loss

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Accumulate gradients inside the context; the next backward pass outside ends the update."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], object], *_: object, **__: object
    ) -> object:
        """Step the engine with the optimizer's shards, after the closure; return the closure's value."""
        value = closure()
        self.engine.step()
        return value

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip sharded gradients as `torch.nn.utils.clip_grad_norm_` clips whole ones.

        Each gradient is gathered once for the norm, and once more if it must be scaled.
        """
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        parameters = list(parameters)
        norm = torch.stack([safe_get_full_grad(p).float().norm() for p in parameters]).norm()
        if norm > max_norm:
            for parameter in parameters:
                safe_set_full_grad(parameter, safe_get_full_grad(parameter) * (max_norm / (norm + 1e-6)))
        return norm

    @contextmanager
    def whole_weights(self, *modules: nn.Module) -> Generator[None, None, None]:
        """Gather the weights of these modules on every rank for as long as the context lasts.

        Ranks sample different numbers of tokens, so they cannot gather layer by layer: one would wait for
        calls that another does not make.
        """
        if self.zero_stage < 3 or self.engine is None:
            yield
            return
        import deepspeed

        offload = self.engine.optimizer.parameter_offload
        gathered = dict.fromkeys(p for module in modules for p in module.parameters())  # each once, in order
        with deepspeed.zero.GatheredParameters(list(gathered)):
            offload.destroy()  # removes hooks that release weights and need the same calls on every rank
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the unsharded optimizer state in torch's own format, on the CPU of the first rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        sharded = self.engine.optimizer.optimizer
        held: dict[str, Tensor] = next(iter(sharded.state.values()), {})
        state: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(p for group in self.groups for p in group if held):
            whole = {
                name: value.clone() if value.dim() == 0 else safe_get_full_optimizer_state(parameter, name)
                for name, value in held.items()
            }
            if self.is_global_zero:
                state[number] = {name: value.to("cpu", copy=True) for name, value in whole.items()}
        numbers, groups = iter(range(10**9)), []
        for shared, members in zip(sharded.param_groups, self.groups, strict=True):
            kept = {name: value for name, value in shared.items() if name != "params"}
            groups.append({**kept, "params": [next(numbers) for _ in members]})
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shard a state that `optimizer_state`, or any other strategy, has saved."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (saved,) = checkpoint["optimizer_states"]
        sharded = self.engine.optimizer.optimizer
        held: dict[str, Tensor] = next(iter(saved["state"].values()), {})
        for group, old in zip(sharded.param_groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in old.items() if name != "params"})
        flat = "fp32_partitioned_groups_flat" if self.zero_stage == 3 else "single_partition_of_fp32_groups"
        for share in getattr(self.engine.optimizer, flat):
            for name, value in held.items():
                sharded.state[share][name] = (
                    value.to(share.device, copy=True) if value.dim() == 0 else torch.zeros_like(share)
                )
        if held and self.zero_stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()  # links its shards to the new state
        for number, parameter in enumerate(p for group in self.groups for p in group):
            for name, value in saved["state"].get(number, {}).items():
                if value.dim():
                    safe_set_full_optimizer_state(parameter, value.to(self.root_device), name)

    def on_exception(self, exception: BaseException) -> None:
        """Drop the engine after an error, so that teardown gathers nothing: other ranks may not take part."""
        self.engine = None
        super().on_exception(exception)

    def teardown(self) -> None:
        """Give every rank whole weights again, and destroy the engine."""
        if self.engine is not None:
            assert self.lightning_module is not None, "the engine wraps the module"
            if self.zero_stage == 3:
                for parameter in self.lightning_module.parameters():
                    cast("Any", parameter).all_gather()
            self.engine.destroy()
            self.engine = None
        super().teardown()
