"""Sampling by vLLM servers on other GPUs or nodes: plain vLLM, started by `python -m segrl.serve`.

    rank r -- one request per group --------------------------> server r modulo their number -- n completions --> rank r
    rank s -- weights, an adapter merged, when they are new --> server s                       (s < number of servers)

A server says which weights it holds, by a name that is a function of the weights themselves; so ranks agree on it without
speaking to each other, and a server that was started anew, or that another run has taken, is noticed.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import requests
import torch

from segrl.models.hf_vlm import HFPolicy
from segrl.rollout import vllm_wire as wire
from segrl.types import Completions, Prefix

_PAUSE = 1.0  # seconds between two looks at a server that is not ready
# What a server says it holds: nothing that anybody wrote; what is not whole yet, for good if that breaks off.
_FRESH, _UNFINISHED = "default", "being written"
_TAKEN = "rollout.servers: one run per server is needed; another has written its weights to {}"
# Seconds that a rank waits for the one before it, and for a writer who seems to be at work.
_GRACE, _ABANDONED = 10.0, 60.0


class _Gone(Exception):
    """There is no server at this address, or not any more."""


def host_and_port(servers: Any) -> list[tuple[str, int]]:  # noqa: ANN401 - whatever a user wrote
    """Of each address.

    Raises:
        ValueError: if it is no list of addresses.
    """
    found = []
    for address in servers if isinstance(servers, Sequence) and not isinstance(servers, str) else ():
        there = urlsplit(str(address))
        try:
            place = there.hostname, there.port
        except ValueError:
            place = None, None
        if there.scheme not in ("http", "https") or place[0] is None or place[1] is None:
            raise ValueError(f"rollout.servers: http://HOST:PORT is needed; got {address}")
        found.append((place[0], place[1]))
    if not found:
        raise ValueError(f"rollout.servers: a list of at least one http://HOST:PORT is needed; got {servers}")
    return found


class _Server:
    """One vLLM server; also what vLLM's transfer of weights speaks through."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address, self.timeout = address.rstrip("/"), timeout

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        """Its answer."""
        return self._call("GET", path)

    def post(self, path: str, **content: Any) -> Any:  # noqa: ANN401 - JSON
        """Its answer to `content`."""
        return self._call("POST", path, json=content)

    def _call(self, verb: str, path: str, **content: Any) -> Any:  # noqa: ANN401 - JSON
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy stands between the nodes of a cluster
                answer = session.request(verb, f"{self.address}/{path}", timeout=self.timeout, **content)
        except requests.ReadTimeout:
            raise ValueError(
                f"rollout.timeout: {self.address}/{path} gave no answer in {self.timeout:g} s"
            ) from None
        except requests.ConnectionError:
            raise _Gone("no connection") from None
        except requests.RequestException as error:
            raise _Gone(f"an answer that breaks off ({type(error).__name__})") from None
        if not answer.ok:
            raise ValueError(
                f"rollout.servers: {self.address}/{path} answers {answer.status_code}: {answer.text[:300]}"
            )
        return answer.json() if answer.content else None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Its workers go to meet the trainer."""
        self.post("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """From here on it holds neither the old weights nor the new."""
        self.post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Its workers receive what `update_info` names; returns when they have it."""
        self.post("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """What it remembers of prompts was of the old weights."""
        self.post("finish_weight_update")
        for remembered in ("reset_prefix_cache", "reset_encoder_cache"):
            self.post(remembered)

    def own_address(self) -> str:
        """This machine's, as the server sees it."""
        ((host, port),) = host_and_port([self.address])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((host, port))
            address: str = probe.getsockname()[0]
        return address


class VLLMServer(wire.Engine):
    """Samples in vLLM servers.

    Args:
        max_tokens: a completion is cut off after this many.
        max_prefix: longest prefix in tokens.
        servers: their addresses, such as `http://127.0.0.1:8000`; at most one per rank.
        timeout: seconds to wait for a server that starts, and for an answer.

    Raises:
        ValueError: if vLLM is not installed, or an address is none.
    """

    def __init__(self, max_tokens: int, max_prefix: int, servers: Sequence[str], timeout: float) -> None:
        wire.needs_vllm("vllm_server")
        host_and_port(servers)
        self.max_tokens, self.max_prefix = max_tokens, max_prefix
        self.servers, self.timeout = [_Server(address, timeout) for address in servers], timeout
        self.link: Any = None
        self.known: str | None = None
        self.pushed: str | None = None

    @torch.no_grad()
    def _generate(
        self, policy: HFPolicy, prefixes: Sequence[Prefix], group_size: int, temperature: float, seeds: Sequence[int]
    ) -> Completions:  # fmt: skip
        wire.check_lengths(prefixes, self.max_prefix)
        asked = [
            _request(policy, prefix, wire.settings(policy, group_size, temperature, seed, self.max_tokens))
            for prefix, seed in zip(prefixes, seeds, strict=True)
        ]
        weights, deadline, told = policy.fingerprint(), time.monotonic() + self.timeout, ""
        while True:
            try:
                self._follow(policy, weights, deadline)
                with ThreadPoolExecutor(len(asked)) as threads:
                    said = list(threads.map(partial(self._ask, weights), prefixes, asked))
                return wire.completions(policy, [one for group in said for one in group])
            except _Gone as error:
                if not told:
                    told = f"waiting up to {self.timeout:g} s for {self._server.address}: {error}"
                    print(told, file=sys.stderr, flush=True)
                self._drop()
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"rollout.servers: a server is needed at {self._server.address} (python -m segrl.serve); for {self.timeout:g} s "
                        f"(rollout.timeout) there was {error}"
                    ) from None
                time.sleep(_PAUSE)

    def _ask(self, weights: str, prefix: Prefix, asked: dict[str, Any]) -> list[wire.Said]:
        """One group's completions, all of them from these weights."""
        answer = self._server.post("inference/v1/generate", **asked)
        wire.check_read(prefix, answer["prompt_token_ids"])
        group = sorted(answer["choices"], key=lambda one: int(one["index"]))
        if others := {span["version"] for one in group for span in one["weight_versions"]} - {weights}:
            if _FRESH in others:
                raise _Gone(f"{self._server.address} was started anew")
            raise ValueError(_TAKEN.format(self._server.address))
        return [_said(one) for one in group]

    @property
    def _rank(self) -> int:
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    @property
    def _server(self) -> _Server:
        return self.servers[self._rank % len(self.servers)]

    def _follow(self, policy: HFPolicy, weights: str, deadline: float) -> None:
        """See to it that the server has these weights: fill it, or wait for the rank that does.

        Ranks of one server take turns: the others fill it only where the first has not for a while, because it is done and waits
        for them. What is being written is left alone, until it seems that the writer was killed.
        """
        turn, seen, since = self._rank // len(self.servers), "", 0.0
        if self.pushed is None and turn == 0:
            self._check(policy)
        while (held := self._server.get("weight_info")["weight_version"]) != weights:
            if turn == 0 and self.known is not None and held not in (self.known, _FRESH, _UNFINISHED):
                raise ValueError(_TAKEN.format(self._server.address))
            if held != seen:
                seen, since = held, time.monotonic()
            if time.monotonic() - since >= (_ABANDONED if held == _UNFINISHED else turn * _GRACE):
                self._fill(policy, weights, held)
            elif time.monotonic() > deadline:
                raise ValueError(
                    f"rollout.servers: {self._server.address} was not given these weights for {self.timeout:g} s; it has {held}"
                )
            else:
                time.sleep(_PAUSE / 10)
        self.known = weights

    def _fill(self, policy: HFPolicy, weights: str, held: str) -> None:
        """Send all weights."""
        if held != self.pushed:  # a new server, or another run has left it: what was open leads nowhere
            self._drop()
        if held == _UNFINISHED:  # its writer was killed, before or after its workers noticed
            with suppress(ValueError):
                self._server.post("finish_weight_update")
        self._server.post("update_weight_version", new_version=_UNFINISHED)
        try:
            self.link = self.link or self._open(policy)
            self.link.send_weights()
        except RuntimeError as error:  # torch's word for a connection that broke, or never came to be
            raise _Gone(str(error).splitlines()[0]) from None
        self._server.post("update_weight_version", new_version=weights)
        self.pushed = weights

    def _open(self, policy: HFPolicy) -> Any:  # noqa: ANN401 - vllm's own class
        """Meet the server's workers for the transfer of weights."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        from segrl.rollout.vllm_weights import GlooTrainerInitInfo, PolicyWeights, register

        register()
        meeting = NCCLTrainerInitInfo if policy.device.type == "cuda" else GlooTrainerInitInfo
        return WeightTransferTrainerFactory.trainer_init(
            meeting(
                rank=0, master_address=self._server.own_address(), master_port=get_open_port(),
                world_size=1 + self._server.get("get_world_size")["world_size"],
            ),
            client=self._server, source=PolicyWeights(policy, policy.pass_dtype),
        )  # fmt: skip

    def _drop(self) -> None:
        """Close what is open."""
        if self.link is not None:
            self.link.shutdown()
        self.link = self.pushed = None

    def _check(self, policy: HFPolicy) -> None:
        """Raises ValueError for a server that was started with other settings than the policy's, or is one too many."""
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if len(self.servers) > ranks:
            raise ValueError(
                f"rollout.servers: at most one per rank ({ranks}) is needed; got {len(self.servers)}"
            )
        told = self._server.get("server_info?config_format=json")["vllm_config"]
        model, transfer = told["model_config"], told["weight_transfer_config"] or {}
        wanted = {
            "dtype (trainer.precision, policy.dtype)": (str(policy.pass_dtype), model["dtype"]),
            "logprobs-mode": ("processed_logprobs", model["logprobs_mode"]),
            "enable-mm-embeds": (True, (model["multimodal_config"] or {}).get("enable_mm_embeds")),
            "weight-transfer-config": (transfer_backend(policy.device.type), transfer.get("backend")),
        }
        for setting, (needed, has) in wanted.items():
            if needed != has:
                raise ValueError(
                    f"rollout.servers: {self._server.address} must be started by python -m segrl.serve with this run's overrides; its {setting} is "
                    f"{has}, {needed} is needed"
                )
        needed = wire.model_length(policy.model.config, self.max_prefix, self.max_tokens)
        if model["max_model_len"] < needed:
            raise ValueError(
                f"rollout.servers: {self._server.address} reads {model['max_model_len']} tokens; rollout.max_prefix + rollout.max_tokens are "
                f"{needed}"
            )


def transfer_backend(device: str) -> str:
    """VLLM's name of the way weights take."""
    return "nccl" if device == "cuda" else "segrl_gloo"


def _request(policy: HFPolicy, prefix: Prefix, settings: dict[str, Any]) -> dict[str, Any]:
    """The body of one group's request."""
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

    image = wire.picture(policy, prefix)
    return {
        "token_ids": prefix.token_ids.tolist(), "sampling_params": settings, "return_token_ids": True,
        "features": {
            "mm_hashes": {"image": [image.name]}, "kwargs_data": {"image": [encode_mm_kwargs_item(image.item)]},
            "mm_placeholders": {"image": [{"offset": image.first, "length": image.length}]},
        },
    }  # fmt: skip


def _said(one: dict[str, Any]) -> wire.Said:
    """One completion of an answer."""
    logprobs = [place["logprob"] for place in one["logprobs"]["content"]]
    return wire.Said(one["token_ids"], logprobs, one["finish_reason"] == "stop")
