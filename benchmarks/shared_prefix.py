"""One GRPO update of the nano policy: every prefix read once, beside one row per completion.

`python benchmarks/shared_prefix.py` prints one JSON line: CPU seconds of each side (median of the rounds,
taken in turn), their ratio, and the largest difference of the log-probabilities. Both sides sample
completions of the same lengths and update all weights.
"""

from __future__ import annotations

import json
import statistics
import time

import torch

from segrl.data.synthetic import SyntheticScenes
from segrl.runs.configuration import asset
from segrl.models.hf_vlm import HFPolicy
from segrl.prompts.tags import SegR1Tags
from segrl.rollout.shared_prefix import SharedPrefixEngine

SAMPLES, GROUP, TOKENS, ROUNDS = 8, 8, 24, 5


def update(policy: HFPolicy, prefixes: list, group: int, repeats: int) -> tuple[float, torch.Tensor]:
    """Return the CPU seconds of sampling and of a forward and backward pass, and the log-probabilities."""
    began = time.process_time()
    rows = [prefix for prefix in prefixes for _ in range(repeats)]
    completions = SharedPrefixEngine(TOKENS).sample(policy, rows, group, range(len(rows) * group))
    policy.zero_grad()
    logprobs = policy.logprobs(rows, completions)
    logprobs.sum().backward()
    return time.process_time() - began, logprobs.detach()


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    policy = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False)
    policy.stop_ids = torch.tensor([-1])  # fixed length on both sides
    scenes, grammar = SyntheticScenes("bench", SAMPLES, 0, 128, (0.3, 1.0), (1, 1)), SegR1Tags(16, 64)
    prefixes = [policy.encoder.encode(grammar.messages(None), scenes[i].image) for i in range(SAMPLES)]
    seconds: dict[str, list[float]] = {"shared": [], "naive": []}
    difference = 0.0
    for _ in range(ROUNDS + 1):
        shared, a = update(policy, prefixes, GROUP, 1)
        naive, b = update(policy, prefixes, 1, GROUP)
        seconds["shared"].append(shared)
        seconds["naive"].append(naive)
        difference = max(difference, float((a - b).abs().max()))
    medians = {name: round(statistics.median(values[1:]), 4) for name, values in seconds.items()}
    print(json.dumps({
        "samples": SAMPLES, "group": GROUP, "tokens": TOKENS, "prefix": len(prefixes[0].token_ids),
        "rounds": ROUNDS, "cpu_seconds": medians, "ratio": round(medians["naive"] / medians["shared"], 2),
        "largest_difference": difference,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
