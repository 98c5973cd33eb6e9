"""How the policy's weights come into vLLM, each way by vLLM's own calls: init, start, update, finish.

    same process         the worker takes the tensors as they are       HandedOver
    server, with CUDA    NCCL broadcast, packed                         vLLM's own, "nccl"
    server, without      the same handshake, broadcast by gloo          GlooReceiver and GlooSender

vLLM finds `register` by an entry point of this package, in each of its processes. Only they and the engines of this folder
import this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from segrl.models.hf_vlm import HFPolicy

HANDED_OVER, GLOO = "segrl_handed_over", "segrl_gloo"
_PATIENCE = timedelta(minutes=5)


@cache
def register() -> None:
    """Tell vLLM of the two ways that it does not have itself."""
    WeightTransferEngineFactory.register_engine(HANDED_OVER, HandedOver)
    WeightTransferEngineFactory.register_engine(GLOO, GlooReceiver)
    WeightTransferTrainerFactory.register_engine(GLOO, GlooSender)


class PolicyWeights(WeightSource):
    """Every weight of a policy by its name in a Hugging Face folder, an adapter merged, in the precision vLLM runs in."""

    def __init__(self, policy: HFPolicy, dtype: torch.dtype) -> None:
        self.policy, self.dtype = policy, dtype
        self.declared: list[ParamMeta] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Of this moment."""
        for name, value in self.policy.merged():
            yield name, value.detach().to(self.dtype)

    def metadata(self) -> list[ParamMeta]:
        """Names and shapes; they never change."""
        self.declared = self.declared or [ParamMeta(name, v.dtype, tuple(v.shape)) for name, v in self]
        return self.declared


class HandedOver(NCCLWeightTransferEngine):
    """For an engine in the trainer's process: nothing is sent, so nothing is opened."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load all weights."""
        self.model.load_weights(update_info["weights"])


class GlooReceiver(NCCLWeightTransferEngine):
    """A worker's side of the broadcast on machines without CUDA."""

    model_update_group: Any

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Meet the trainer."""
        place = self.parallel_config.data_parallel_index * self.parallel_config.world_size
        rank = place + self.parallel_config.rank + init_info.rank_offset
        self.shutdown()
        self.model_update_group = _meet(
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load one weight after the other.

        Raises RuntimeError where the trainer goes away, with the model in a state that can be written anew.
        """
        expected = NCCLWeightTransferUpdateInfo(**update_info)
        try:
            for name, dtype, shape in zip(expected.names, expected.dtype_names, expected.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                _broadcast(self.model_update_group, weight)
                self.model.load_weights([(name, weight)])
        except RuntimeError:
            self.finish_weight_update()  # else a layer that was loaded in half stays so
            raise

    def shutdown(self) -> None:
        """Leave the trainer."""
        group, self.model_update_group = self.model_update_group, None
        if group is not None:
            group.shutdown()


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """Where the trainer waits, and for how many."""

    backend: ClassVar[str] = GLOO


class GlooSender(NCCLTrainerWeightTransferEngine):
    """The trainer's side; vLLM's own `send_weights` drives it."""

    model_update_group: Any
    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info: GlooTrainerInitInfo, *, client: Any, source: Any = None) -> GlooSender:  # noqa: ANN401 - vllm's protocols
        """Ask the workers to come, and meet them: both at once, since each waits for the other."""
        engine = cls(client=client, source=source)
        invitation = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address, master_port=init_info.master_port, rank_offset=1, world_size=init_info.world_size
        )  # fmt: skip
        with ThreadPoolExecutor(1) as thread:
            came = thread.submit(client.init_weight_transfer_engine, worker_init_payload(invitation))
            engine.model_update_group = _meet(
                init_info.master_address, init_info.master_port, 0, init_info.world_size
            )
            came.result()
        return engine

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        for _, tensor in self._checked_iter(source, meta):
            _broadcast(self.model_update_group, tensor.contiguous())

    def shutdown(self) -> None:
        """Leave the workers."""
        group, self.model_update_group = self.model_update_group, None
        if group is not None:
            group.shutdown()


def _meet(address: str | None, port: int | None, rank: int, world_size: int) -> Any:  # noqa: ANN401 - a gloo group
    """A group of the trainer, rank 0, and the workers."""
    return stateless_init_torch_distributed_process_group(
        address, port, rank, world_size, "gloo", timeout=_PATIENCE
    )


def _broadcast(group: Any, tensor: Tensor) -> None:  # noqa: ANN401 - a gloo group
    """From rank 0; such a group has no place among torch's own, so its method is called."""
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()
