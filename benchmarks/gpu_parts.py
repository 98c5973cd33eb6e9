"""Measure on a GPU what `gpu_check.sh` asks for, part by part.

Every finding is a JSON line, printed at once and appended to `$OUT/results.jsonl`.

    python benchmarks/gpu_parts.py PART [--rehearse]

PART is one of

    machine   versions, what the card says of itself, its speeds
    agree     the nano policy on the GPU beside the CPU: log-probabilities, gradients, greedy tokens
    kernels   single operations whose speed on a GPU is uncertain, at the shapes of 3B
    steps     GRPO updates of a random policy of 3B's shape: seconds of every part, memory, the floor;
              the same without graphs, with activations kept; kernels
    peer      the same update by TRL's trainer

`--rehearse` does the same on a CPU at tiny shapes. It shows that the part works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import random
import sys

import noise
import torch

from gpu_kit.findings import Findings

PARTS = ("machine", "agree", "kernels", "steps", "peer")


def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="of steps: begin no other one after so many"
    )
    asked = parser.parse_args()
    findings, rehearse = Findings(asked.part), asked.rehearse
    if not rehearse and not torch.cuda.is_available():
        findings.say(error="no GPU is seen")
        return 3
    device = torch.device("cpu" if rehearse else "cuda")
    random.seed(0)
    work = noise.Work(prompts=2, tokens=16, side=196) if rehearse else noise.Work(
        prompts=asked.prompts, tokens=asked.tokens, side=768
    )  # fmt: skip
    if asked.part == "machine":
        from gpu_kit.machine import machine

        machine(findings, device, rehearse)
    elif asked.part == "agree":
        from gpu_kit.agree import agree

        agree(findings, device)
    elif asked.part == "kernels":
        from gpu_kit.kernels import kernels

        kernels(findings, device, rehearse)
    elif asked.part == "steps":
        from gpu_kit.steps import steps

        steps(findings, device, rehearse, work, asked.seconds)
    else:
        from gpu_kit.peer import peer

        peer(findings, device, rehearse, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
