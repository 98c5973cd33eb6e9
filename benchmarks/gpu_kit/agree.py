"""Compare the trained nano policy on the device with itself in float32 on the CPU."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import tiny_vlm
import torch

from gpu_kit.findings import Findings

GROUP, TOKENS = 4, 40
LENGTHS = (40, 1, 17, 25, 33, 8, 40, 2, 12, 30, 21, 5, 39, 16, 7, 28)


def agree(findings: Findings, device: torch.device) -> None:
    """Say how far log-probabilities, the whole gradient and greedy tokens are from the CPU's.

    Both float32 and bfloat16 are compared. The reference is the CPU's own bfloat16, as this part measures it
    with `--rehearse`: log-probabilities differ by at most 0.04, the gradient by 1.2% of its norm. Float32 on
    a GPU should be within 1e-4.
    """
    from segrl.runs.configuration import asset
    from segrl.models.hf_vlm import HFPolicy

    torch.manual_seed(0)
    policy = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False)
    prefixes = [
        policy.encoder.encode(_asked(i), tiny_vlm.image(i, 128)) for i in range(len(LENGTHS) // GROUP)
    ]
    said = _completions(policy.never_sampled)
    expected = _learned(policy, prefixes, said, torch.device("cpu"), False)
    for half in (False, True):
        name = "bfloat16" if half else "float32"
        findings.tried(
            name, partial(_compare, findings, name, policy, prefixes, said, expected, device, half)
        )


def _asked(more: int) -> list[dict[str, Any]]:
    """Return a chat; `more` makes prefixes of unequal length."""
    text = {"type": "text", "text": "Segment the object." + " Now." * more}
    return [{"role": "user", "content": [{"type": "image"}, text]}]


def _completions(never: torch.Tensor) -> Any:
    """Return random completions of unequal length, none of whose tokens is among `never`."""
    from segrl.types import Completions

    tokens = torch.randint(0, 300, (len(LENGTHS), TOKENS))
    tokens = tokens.masked_fill(torch.isin(tokens, never), 0)
    mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    return Completions(tokens=tokens, mask=mask, texts=[""] * len(LENGTHS), finished=mask[:, 0])


def _learned(policy: Any, prefixes: list[Any], said: Any, where: torch.device, half: bool) -> tuple[Any, ...]:
    """Return log-probabilities `[N, T]`, gradients of a weighted sum of them by name, and greedy tokens.

    All of them are on the CPU.
    """
    from segrl.rollout.shared_prefix import SharedPrefixEngine
    from segrl.types import Completions

    there = Completions(
        tokens=said.tokens.to(where),
        mask=said.mask.to(where),
        texts=said.texts,
        finished=said.finished.to(where),
    )
    given = [prefix.to(where) for prefix in prefixes]
    weights = torch.linspace(-1, 1, said.mask.numel()).view_as(said.mask.float()).to(where)
    with torch.autocast(where.type, torch.bfloat16, enabled=half, cache_enabled=False):
        logprobs = policy.logprobs(given, there)
        (logprobs * weights).sum().backward()
        gradients = {
            n: p.grad.detach().float().cpu() for n, p in policy.named_parameters() if p.grad is not None
        }
        policy.zero_grad()
        greedy = SharedPrefixEngine(TOKENS).greedy(policy, given).tokens.cpu()
    return logprobs.detach().float().cpu(), gradients, greedy


def _compare(
    findings: Findings, name: str, policy: Any, prefixes: list[Any], said: Any, expected: tuple[Any, ...],
    device: torch.device, half: bool,
) -> None:  # fmt: skip
    """Say the distances of one precision."""
    logprobs, gradients, greedy = _learned(copy.deepcopy(policy).to(device), prefixes, said, device, half)
    of_logprobs, of_gradients, of_greedy = expected
    whole = torch.cat([gradient.flatten() for gradient in of_gradients.values()])
    flat = torch.cat([gradients[n].flatten() for n in of_gradients])
    off, wide = (logprobs - of_logprobs).abs(), min(greedy.shape[1], of_greedy.shape[1])
    large = {n: g for n, g in of_gradients.items() if g.norm() > 1e-3 * whole.norm()}
    cosine, worst = min(
        (float(torch.cosine_similarity(gradients[n].flatten(), g.flatten(), 0)), n) for n, g in large.items()
    )
    findings.say(
        name=name, logprob_off_max=float(off.max()), logprob_off_mean=float(off[said.mask].mean()),
        gradient_off=float((flat - whole).norm() / whole.norm()), worst_cosine=cosine, worst_of=worst,
        greedy_alike=float((greedy[:, :wide] == of_greedy[:, :wide]).float().mean()),
    )  # fmt: skip
