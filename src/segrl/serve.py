"""`python -m segrl.serve +experiment=NAME rollout=vllm_server [-- FLAGS]`: plain vLLM, with the settings that this run needs.

What stands behind `--` goes to vLLM as it is: `--tensor-parallel-size 2`, `--gpu-memory-utilization 0.9`, `--host 0.0.0.0`. The server
speaks to whoever reaches it, weights included; without `--host` that is this machine alone.
"""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig, OmegaConf

from segrl.front_door import check, enter


def flags(cfg: DictConfig, device: str) -> list[str]:
    """VLLM's command line: what has to agree with the trainer.

    Args:
        cfg: of the run that will ask.
        device: the server's, "cuda" or "cpu".

    Raises:
        ValueError: if the run samples elsewhere.
    """
    from segrl.rollout.vllm_server import host_and_port, transfer_backend

    if "servers" not in cfg.rollout:
        raise ValueError("rollout: rollout=vllm_server is needed by segrl.serve")
    asked = OmegaConf.to_container(cfg.rollout, resolve=True)
    assert isinstance(asked, dict)
    (_, port), *_ = host_and_port(asked["servers"])
    dtype = "bfloat16" if str(cfg.trainer.precision).startswith("bf16") else str(cfg.policy.dtype)
    return [
        "--model", str(cfg.policy.weights), "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--seed", "0",
        "--max-model-len", str(cfg.rollout.max_prefix + cfg.rollout.max_tokens), "--limit-mm-per-prompt", '{"image": 1}',
        "--enable-mm-embeds", "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--load-format", "dummy",
        "--weight-transfer-config", f'{{"backend": "{transfer_backend(device)}"}}',
    ]  # fmt: skip


def become_server(cfg: DictConfig, theirs: list[str]) -> None:
    """Replace this process by vLLM's server, with flags of the user's behind ours."""
    check(cfg)
    from segrl.rollout.vllm_wire import needs_vllm

    needs_vllm("vllm_server")
    import torch

    asked = flags(cfg, "cuda" if torch.cuda.is_available() else "cpu") + theirs
    print(f"python -m vllm.entrypoints.launchers.api_server.entry {' '.join(asked)}", flush=True)
    os.environ.update(
        {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    )  # weights come by calls of the first
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *asked])


def main() -> None:
    """Entry point."""
    theirs: list[str] = []
    if "--" in sys.argv:
        split = sys.argv.index("--")
        theirs, sys.argv[split:] = sys.argv[split + 1 :], []

    def job(cfg: DictConfig) -> None:
        """What hydra runs."""
        become_server(cfg, theirs)

    enter("train", job)


if __name__ == "__main__":
    main()
