"""Transfer the policy's weights to vLLM through vLLM's own calls: init, start, update, finish.

    same process            the worker loads the policy's tensors        HandedOver
    server with CUDA        NCCL broadcast, packed                       vLLM's own, "nccl"
    server without CUDA     the same handshake, gloo broadcast           GlooReceiver and GlooSender

An entry point of this package lets each process of vLLM call `register`. Only these processes and the
engines of this folder import this file.
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

from segrl.protocols import ServedPolicy

HANDED_OVER, GLOO = "segrl_handed_over", "segrl_gloo"
_PATIENCE = timedelta(minutes=5)


@cache
def register() -> None:
    """Register the two transfer backends of this file with vLLM."""
    WeightTransferEngineFactory.register_engine(HANDED_OVER, HandedOver)
    WeightTransferEngineFactory.register_engine(GLOO, GlooReceiver)
    WeightTransferTrainerFactory.register_engine(GLOO, GlooSender)


class PolicyWeights(WeightSource):
    """The weights of a policy, adapter merged, by their names in a Hugging Face folder.

    Args:
        policy: the policy.
        dtype: precision in which vLLM runs; weights are cast to it.
    """

    def __init__(self, policy: ServedPolicy, dtype: torch.dtype) -> None:
        self.policy, self.dtype = policy, dtype
        self.declared: list[ParamMeta] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and present value of each weight."""
        for name, value in self.policy.merged():
            yield name, value.detach().to(self.dtype)

    def metadata(self) -> list[ParamMeta]:
        """Return names, dtypes and shapes, which never change."""
        self.declared = self.declared or [ParamMeta(name, v.dtype, tuple(v.shape)) for name, v in self]
        return self.declared


class HandedOver(NCCLWeightTransferEngine):
    """The worker of an engine in the trainer's process: it loads the tensors without a connection."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the tensors of `update_info["weights"]`."""
        self.model.load_weights(update_info["weights"])


class GlooReceiver(NCCLWeightTransferEngine):
    """The worker's end of the broadcast on machines without CUDA."""

    model_update_group: Any

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Connect to the trainer."""
        place = self.parallel_config.data_parallel_index * self.parallel_config.world_size
        rank = place + self.parallel_config.rank + init_info.rank_offset
        self.shutdown()
        self.model_update_group = _meet(
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load the weights one by one.

        Raises:
            RuntimeError: if the connection to the trainer breaks; the next update can load all weights again.
        """
        expected = NCCLWeightTransferUpdateInfo(**update_info)
        try:
            for name, dtype, shape in zip(expected.names, expected.dtype_names, expected.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                _broadcast(self.model_update_group, weight)
                self.model.load_weights([(name, weight)])
        except RuntimeError:
            self.finish_weight_update()  # without it, a layer that was loaded in part would stay so
            raise

    def shutdown(self) -> None:
        """Close the connection to the trainer."""
        group, self.model_update_group = self.model_update_group, None
        if group is not None:
            group.shutdown()


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """Address and port of the trainer, and the number of processes that connect."""

    backend: ClassVar[str] = GLOO


class GlooSender(NCCLTrainerWeightTransferEngine):
    """The trainer's end of the broadcast; vLLM's own `send_weights` calls it."""

    model_update_group: Any
    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: Any,  # noqa: ANN401 - vllm's protocol
        source: Any = None,  # noqa: ANN401 - vllm's protocol
    ) -> GlooSender:
        """Ask the workers to connect and accept them at the same time: each end waits for the other."""
        engine = cls(client=client, source=source)
        invitation = NCCLWeightTransferInitInfo(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            rank_offset=1,
            world_size=init_info.world_size,
        )
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
        """Close the connection to the workers."""
        group, self.model_update_group = self.model_update_group, None
        if group is not None:
            group.shutdown()


def _meet(address: str | None, port: int | None, rank: int, world_size: int) -> Any:  # a gloo group
    """Return a gloo process group of the trainer, rank 0, and the workers."""
    return stateless_init_torch_distributed_process_group(
        address, port, rank, world_size, "gloo", timeout=_PATIENCE
    )


def _broadcast(group: Any, tensor: Tensor) -> None:  # noqa: ANN401 - a gloo group
    """Broadcast a tensor from rank 0.

    The group is not registered with `torch.distributed`, so its method is called directly.
    """
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()
