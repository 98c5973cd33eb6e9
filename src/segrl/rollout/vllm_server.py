"""Sample in vLLM servers on other GPUs or nodes; `python -m segrl.serve` starts plain vLLM.

    rank r -- one request per group ---------> server r % S -- n completions --> rank r    (S servers)
    rank s -- new weights, adapter merged ---> server s                                    (s < S)

A server stores the version of its weights, which is a hash of them. So ranks agree on it without
communication, and notice if a server was restarted or another run has pushed its weights to it.
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

from segrl.protocols import ServedPolicy
from segrl.rollout import vllm_wire as wire
from segrl.types import Completions, Prefix

_PAUSE = 1.0  # seconds between two requests to a server that is not ready
# Values of a server's `weight_version`: _FRESH if no weights were pushed yet; _UNFINISHED during a push, and
# after one that was interrupted.
_FRESH, _UNFINISHED = "default", "being written"
_TAKEN = (
    "rollout.servers: must be used by one run alone; another has written its weights to {} "
    "(start a server for each run: python -m segrl.serve)"
)
# Seconds that a rank waits for the previous rank of its server, and for a push in progress.
_GRACE, _ABANDONED = 10.0, 60.0


class _Gone(Exception):
    """The server cannot be reached, or was restarted."""


def host_and_port(servers: Any) -> list[tuple[str, int]]:  # noqa: ANN401 - any value of a configuration
    """Return host and port of each address.

    Raises:
        ValueError: if `servers` is not a list of at least one `http://HOST:PORT` or `https://HOST:PORT`.
    """
    found = []
    for address in servers if isinstance(servers, Sequence) and not isinstance(servers, str) else ():
        there = urlsplit(str(address))
        try:
            place = there.hostname, there.port
        except ValueError:
            place = None, None
        if there.scheme not in ("http", "https") or place[0] is None or place[1] is None:
            raise ValueError(
                f"rollout.servers: each must be https://HOST:PORT or http://HOST:PORT; got {address}"
            )
        found.append((place[0], place[1]))
    if not found:
        raise ValueError(f"rollout.servers: must be a list of at least one http://HOST:PORT; got {servers}")
    return found


class _Server:
    """Client of one vLLM server; vLLM's weight transfer calls it, too."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address, self.timeout = address.rstrip("/"), timeout

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        """Return the server's answer to a GET request."""
        return self._call("GET", path)

    def post(self, path: str, **content: Any) -> Any:  # noqa: ANN401 - JSON
        """Return the server's answer to a POST request with `content` as JSON."""
        return self._call("POST", path, json=content)

    def _call(self, verb: str, path: str, **content: Any) -> Any:  # noqa: ANN401 - JSON
        try:
            with requests.Session() as session:
                session.trust_env = False  # ignore proxy settings: nodes of a cluster connect directly
                answer = session.request(verb, f"{self.address}/{path}", timeout=self.timeout, **content)
        except requests.ReadTimeout:
            raise ValueError(
                f"rollout.timeout: must be long enough for an answer; {self.address}/{path} gave none in "
                f"{self.timeout:g} s"
            ) from None
        except requests.ConnectionError:
            raise _Gone("no connection") from None
        except requests.RequestException as error:
            raise _Gone(f"an incomplete answer ({type(error).__name__})") from None
        if not answer.ok:
            raise ValueError(
                f"rollout.servers: {self.address}/{path} must succeed; it answers {answer.status_code}: "
                f"{answer.text[:300]}"
            )
        return answer.json() if answer.content else None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the server's workers connect to the trainer."""
        self.post("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Start an update; until it is finished, the server's weights are undefined."""
        self.post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the workers receive the weights that `update_info` names; return when they have them."""
        self.post("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish an update and drop the caches of prefixes and images, which belong to the old weights."""
        self.post("finish_weight_update")
        for remembered in ("reset_prefix_cache", "reset_encoder_cache"):
            self.post(remembered)

    def own_address(self) -> str:
        """Return this machine's address on the route to the server."""
        ((host, port),) = host_and_port([self.address])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # UDP: connecting sends nothing
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
        ValueError: if vLLM is not installed, or `servers` is not a list of addresses.
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
        self,
        policy: ServedPolicy,
        prefixes: Sequence[Prefix],
        group_size: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> Completions:
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
                        f"rollout.servers: must be running servers (python -m segrl.serve); "
                        f"{self._server.address} was not ready in {self.timeout:g} s "
                        f"(rollout.timeout): {error}"
                    ) from None
                time.sleep(_PAUSE)

    def _ask(self, weights: str, prefix: Prefix, asked: dict[str, Any]) -> list[wire.VLLMCompletion]:
        """Return one group's completions.

        Raises:
            _Gone: if the server was restarted since the weights were pushed.
            ValueError: if other weights than `weights` took part, because another run pushed them.
        """
        answer = self._server.post("inference/v1/generate", **asked)
        wire.check_read(prefix, answer["prompt_token_ids"])
        group = sorted(answer["choices"], key=lambda one: int(one["index"]))
        if others := {span["version"] for one in group for span in one["weight_versions"]} - {weights}:
            if _FRESH in others:
                raise _Gone(f"{self._server.address} was restarted")
            raise ValueError(_TAKEN.format(self._server.address))
        return [_said(one) for one in group]

    @property
    def _rank(self) -> int:
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    @property
    def _server(self) -> _Server:
        return self.servers[self._rank % len(self.servers)]

    def _follow(self, policy: ServedPolicy, weights: str, deadline: float) -> None:
        """Ensure that the server holds these weights: push them, or wait for the rank that does.

        The server's first rank (turn 0) pushes at once. The rank of turn k pushes only after the version has
        not changed for k * _GRACE seconds, for example because the first rank has finished and waits for
        the others. A push in progress is left alone for _ABANDONED seconds.

        Raises:
            ValueError: if another run has pushed its weights, or the deadline has passed.
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
                    f"rollout.servers: {self._server.address} must receive this run's weights within "
                    f"{self.timeout:g} s; its weight_version is still {held} (set a longer rollout.timeout)"
                )
            else:
                time.sleep(_PAUSE / 10)
        self.known = weights

    def _fill(self, policy: ServedPolicy, weights: str, held: str) -> None:
        """Push all weights to the server; `held` is its present version."""
        if held != self.pushed:  # the server was restarted or used by another run: the connection is stale
            self._drop()
        if held == _UNFINISHED:  # a push was interrupted; its workers may have finished the update already
            with suppress(ValueError):
                self._server.post("finish_weight_update")
        self._server.post("update_weight_version", new_version=_UNFINISHED)
        try:
            self.link = self.link or self._open(policy)
            self.link.send_weights()
        except RuntimeError as error:  # torch raises it if a connection fails or breaks
            raise _Gone(str(error).splitlines()[0]) from None
        self._server.post("update_weight_version", new_version=weights)
        self.pushed = weights

    def _open(self, policy: ServedPolicy) -> Any:  # noqa: ANN401 - vllm's own class
        """Connect to the server's workers for the transfer of weights."""
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
        """Close the connection for weights, and forget what was pushed."""
        if self.link is not None:
            self.link.shutdown()
        self.link = self.pushed = None

    def _check(self, policy: ServedPolicy) -> None:
        """Raise ValueError if there are more servers than ranks, or the server's settings do not fit."""
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if len(self.servers) > ranks:
            raise ValueError(
                f"rollout.servers: must be at most one per rank ({ranks}); got {len(self.servers)}"
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
                    f"rollout.servers: {self._server.address} must have {setting} {needed}; it has {has} "
                    "(start it by python -m segrl.serve with this run's overrides)"
                )
        needed = wire.model_length(policy.most_positions, self.max_prefix, self.max_tokens)
        if model["max_model_len"] < needed:
            raise ValueError(
                f"rollout.servers: {self._server.address} must read {needed} tokens (rollout.max_prefix + "
                f"rollout.max_tokens); it reads {model['max_model_len']}"
            )


def transfer_backend(device: str) -> str:
    """Return the name of vLLM's weight transfer backend for a device type."""
    return "nccl" if device == "cuda" else "segrl_gloo"


def _request(policy: ServedPolicy, prefix: Prefix, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the body of one group's request."""
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

    image = wire.picture(policy, prefix)
    return {
        "token_ids": prefix.token_ids.tolist(), "sampling_params": settings, "return_token_ids": True,
        "features": {
            "mm_hashes": {"image": [image.name]},
            "kwargs_data": {"image": [encode_mm_kwargs_item(image.item)]},
            "mm_placeholders": {"image": [{"offset": image.first, "length": image.length}]},
        },
    }  # fmt: skip


def _said(one: dict[str, Any]) -> wire.VLLMCompletion:
    """Return one completion from a choice of the server's answer."""
    logprobs = [place["logprob"] for place in one["logprobs"]["content"]]
    return wire.VLLMCompletion(one["token_ids"], logprobs, one["finish_reason"] == "stop")
