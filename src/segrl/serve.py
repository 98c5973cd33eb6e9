"""`python -m segrl.serve +experiment=NAME rollout=vllm_server [-- FLAGS]`: start vLLM for a run.

vLLM gets the settings that this run needs. FLAGS are passed on unchanged, such as
`--tensor-parallel-size 2`, `--gpu-memory-utilization 0.9` or `--host 0.0.0.0`. The server answers anyone who
reaches it, and takes weights from them. It listens on 127.0.0.1 unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import socket
import sys

from omegaconf import DictConfig, OmegaConf

from segrl.runs.command import enter
from segrl.runs.configuration import check

_HYDRAS = {
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
}  # fmt: skip


def flags(cfg: DictConfig, device: str) -> list[str]:
    """Return the flags of vLLM that must agree with the training run.

    Args:
        cfg: configuration of the run that samples from the server.
        device: device of the server, "cuda" or "cpu".

    Raises:
        ValueError: if the run does not use `rollout=vllm_server`.
    """
    from transformers import AutoConfig

    from segrl.rollout.vllm_server import host_and_port, transfer_backend
    from segrl.rollout.vllm_wire import WHOLE_PREFIXES, model_length

    if "servers" not in cfg.rollout:
        raise ValueError(
            f"rollout: must be vllm_server for segrl.serve; got {cfg.rollout['_target_']} "
            "(rollout=vllm_server)"
        )
    asked = OmegaConf.to_container(cfg.rollout, resolve=True)
    assert isinstance(asked, dict)
    (_, port), *_ = host_and_port(asked["servers"])
    config = AutoConfig.from_pretrained(cfg.policy.weights, local_files_only=True)
    positions = int(config.text_config.max_position_embeddings)
    length = model_length(positions, cfg.rollout.max_prefix, cfg.rollout.max_tokens)
    dtype = "bfloat16" if str(cfg.trainer.precision).startswith("bf16") else str(cfg.policy.dtype)
    return [
        "--model", str(cfg.policy.weights), "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port),
        "--seed", "0", "--max-model-len", str(length), "--limit-mm-per-prompt", '{"image": 1}',
        "--enable-mm-embeds", "--enable-scale-out", "--logprobs-mode", "processed_logprobs",
        "--load-format", "dummy",
        "--weight-transfer-config", f'{{"backend": "{transfer_backend(device)}"}}',
    ] + ([] if device == "cuda" else [
        "--gpu-memory-utilization", "0.3", "--no-enable-chunked-prefill",
        "--max-num-batched-tokens", str(WHOLE_PREFIXES["max_num_batched_tokens"]),
    ])  # fmt: skip


def check_port(asked: list[str]) -> None:
    """Raise ValueError if the server cannot listen on the host and port among its flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    place, _ = parser.parse_known_args(asked)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((place.host, place.port))
        except OSError as error:
            raise ValueError(
                f"rollout.servers: must name a free port; "
                f"{place.host}:{place.port}: {str(error.strerror).lower()}"
            ) from None


def check_packages_can_be_listed() -> None:
    """Raise ValueError if there is neither pip nor uv, one of which vLLM needs to answer `/server_info`."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv") is None:
        raise ValueError(
            "PATH: must contain the folder of uv, because vLLM lists its packages with pip or uv "
            "and this environment has neither "
            '(make setup puts one into .uv/bin: PATH="$PWD/.uv/bin:$PATH")'
        )


def become_server(cfg: DictConfig, theirs: list[str]) -> None:
    """Check the configuration, and replace this process by vLLM's server.

    Args:
        cfg: configuration of the run.
        theirs: flags of the user. They follow segrl's, so they take precedence.

    Raises:
        ValueError: if the configuration is wrong, vLLM is not installed, or the port is taken.
    """
    check(cfg, files=False)  # a server reads no data
    from segrl.rollout.vllm_wire import needs_vllm

    needs_vllm("vllm_server")
    check_packages_can_be_listed()
    import torch

    asked = flags(cfg, "cuda" if torch.cuda.is_available() else "cpu") + theirs
    check_port(asked)
    print(f"python -m vllm.entrypoints.launchers.api_server.entry {' '.join(asked)}", flush=True)
    # Weights are transferred by endpoints of vLLM's development mode.
    os.environ.update({"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"})
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *asked])


def main() -> None:
    """Run the command line."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(f"{__doc__}\nThe keys are those of the run: python -m segrl.train --help")
        return
    theirs: list[str] = []
    if "--" in sys.argv:
        split = sys.argv.index("--")
        theirs, sys.argv[split:] = sys.argv[split + 1 :], []
    if astray := [
        word for word in sys.argv[1:] if word.startswith("--") and word.split("=")[0] not in _HYDRAS
    ]:
        print(f"segrl: vLLM's flags must follow --; got {astray[0]} before it", file=sys.stderr)
        sys.exit(2)

    def job(cfg: DictConfig) -> None:
        """Start the server with the composed configuration."""
        become_server(cfg, theirs)

    enter("train", job, files=False)


if __name__ == "__main__":
    main()
