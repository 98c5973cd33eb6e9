from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jaxtyping
import pytest
import torch
from torch import Tensor

from segrl.objectives.advantages import group_relative
from segrl.objectives.clipped import importance_ratio, ppo_clip
from segrl.objectives.kl import k3
from segrl.objectives.masked import per_budget as shares_of_budget
from segrl.objectives.masked import per_group as shares_of_groups
from segrl.objectives.masked import per_sequence as shares_of_sequences
from segrl.objectives.masked import per_token as shares_of_tokens
from segrl.objectives.policy_gradient import policy_gradient
from segrl.types import Completions, Experience, Frame, LossOutput, Prefix


def per_sequence(mask: Tensor) -> Tensor:
    return shares_of_sequences(mask, 1, 0.0)


def per_token(mask: Tensor) -> Tensor:
    return shares_of_tokens(mask, 1, float(mask.sum()))


def per_group(mask: Tensor) -> Tensor:
    return shares_of_groups(mask, 3, 0.0)


def per_budget(mask: Tensor) -> Tensor:
    return shares_of_budget(mask, 3, 0.0, budget=6)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return the surrogate of given ratios, through the log-probabilities that give them."""
    mask = torch.ones_like(ratio, dtype=torch.bool)
    gain = advantages[:, None].expand_as(ratio)
    return ppo_clip(ratio.log(), torch.zeros_like(ratio), gain, mask, low=low, high=high).loss


def grpo(
    logprobs: Tensor, old: Tensor | None, reference: Tensor | None, advantages: Tensor, weights: Tensor,
    clip: tuple[float, float], kl_weight: float,
) -> LossOutput:  # fmt: skip
    surrogate = partial(ppo_clip, low=clip[0], high=clip[1])
    gain = advantages if advantages.ndim == 2 else advantages[:, None].expand(-1, logprobs.shape[1])
    out = policy_gradient(logprobs, old, reference, gain, weights, surrogate, k3, kl_weight)
    stats = {name: out.stats[name] for name in ("ratio", "entropy", "kl") if name in out.stats}
    return LossOutput(
        loss=out.loss, stats={**stats, "clip_fraction": out.stats["clip_low"] + out.stats["clip_high"]}
    )


MASK = torch.tensor([[True, True, True], [True, True, False]])
CLIP = (0.2, 0.3)


def double(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ragged(seed: int, rows: int = 6, width: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return new, old and reference log-probabilities, advantages, and the mask."""
    noise = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=noise, dtype=torch.float64)
    new = old + 0.4 * torch.randn(rows, width, generator=noise, dtype=torch.float64)
    reference = old + 0.4 * torch.randn(rows, width, generator=noise, dtype=torch.float64)
    advantages = torch.randn(rows, generator=noise, dtype=torch.float64)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=noise)
    return new, old, reference, advantages, mask


# --- by hand


def by_hand(kl_weight: float, reference: Tensor | None) -> tuple[dict[str, float], float]:
    """Return ratios 3/2, 1, 1/2 for an advantage of +1 and one of -1.

    The bounds are [0.8, 1.3]; the last token is padding.
    """
    new = double([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    old = new - double([[1.5, 1.0, 0.5], [1.5, 1.0, 0.5]]).log()
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    out = grpo(new, old, reference, advantages, per_sequence(MASK).double(), CLIP, kl_weight)
    return {name: value.item() for name, value in out.stats.items()}, out.loss.item()


def test_two_completions_by_hand() -> None:
    # A = +1: min(1.5, 1.3) + 1 + min(0.5, 0.8) = 2.8, a third each, half: -2.8 / 6
    # A = -1: min(-1.5, -1.3) + min(-1, -1) = -2.5, a half each, half: +2.5 / 4
    stats, loss = by_hand(kl_weight=0.0, reference=None)
    assert loss == pytest.approx(-2.8 / 6 + 2.5 / 4, abs=1e-7)
    assert stats["ratio"] == pytest.approx(3.0 / 6 + 2.5 / 4, abs=1e-7)
    # only 1.5 with A = +1 is clipped; 1.5 with A = -1 and 0.5 with A = +1 pay their full price
    assert stats["clip_fraction"] == pytest.approx(1 / 6, abs=1e-7)
    assert stats["entropy"] == pytest.approx(1.0, abs=1e-7)
    assert "kl" not in stats


def test_two_completions_by_hand_with_a_reference_twice_as_likely() -> None:
    reference = double([[-1.0, -1.0, -1.0], [-1.0, -1.0, 55.0]]) + math.log(2)  # 55 is padding
    stats, loss = by_hand(kl_weight=0.5, reference=reference)
    k = 2 - math.log(2) - 1
    assert stats["kl"] == pytest.approx(k, abs=1e-7)
    assert loss == pytest.approx(-2.8 / 6 + 2.5 / 4 + 0.5 * k, abs=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.5, 2.0, -2.6),  # a good token made likelier: nothing gained above 1.3
        (1.25, 2.0, -2.5),  # within bounds, although above 1 + 0.2: the bounds are apart
        (0.5, 2.0, -1.0),  # a good token made less likely: its full price
        (0.5, -2.0, 1.6),  # a bad token made less likely: nothing gained below 0.8
        (0.75, -2.0, 1.6),  # below 0.8, although within 1 - 0.3
        (1.5, -2.0, 3.0),  # a bad token made likelier: its full price
        (1.0, 2.0, -2.0),
        (1.5, 0.0, 0.0),
    ],
)
def test_each_bound_holds_on_its_own_side_only(ratio: float, advantage: float, loss: float) -> None:
    out = clipped_surrogate(torch.tensor([[ratio]]), torch.tensor([advantage]), *CLIP)
    assert out.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"), [(1.5, 2.0, 0.0), (0.5, -2.0, 0.0), (1.5, -2.0, 2.0), (0.5, 2.0, -2.0)]
)
def test_beyond_the_bound_there_is_no_gradient_and_only_there(
    ratio: float, advantage: float, slope: float
) -> None:
    leaf = torch.tensor([[ratio]], requires_grad=True)
    clipped_surrogate(leaf, torch.tensor([advantage]), *CLIP).sum().backward()
    assert leaf.grad.item() == slope


def test_k3_by_hand() -> None:
    same = torch.tensor([[-1.0, -0.3]])
    assert k3(same, same).tolist() == [[0.0, 0.0]]
    # reference e times as likely: e - 1 - 1; e times less likely: 1/e + 1 - 1
    torch.testing.assert_close(
        k3(torch.tensor([[-2.0, -1.0]]), torch.tensor([[-1.0, -2.0]])),
        torch.tensor([[math.e - 2, 1 / math.e]]),
    )


def test_k3_is_never_negative_and_its_mean_under_the_policy_is_the_divergence() -> None:
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.25, 0.25, 0.4, 0.1], dtype=torch.float64)
    values = k3(policy.log()[None], reference.log()[None])[0]
    assert (values >= 0).all()
    assert (policy * values).sum().item() == pytest.approx(
        (policy * (policy / reference).log()).sum().item(), abs=1e-12
    )


# --- against a loop


def naive(
    new: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, weights: Tensor, beta: float
) -> tuple[float, dict[str, float]]:
    """Compute the equation token by token in plain numbers."""
    low, high = CLIP
    loss, stats = 0.0, {"ratio": 0.0, "clip_fraction": 0.0, "entropy": 0.0, "kl": 0.0}
    for n in range(len(new)):
        for t in range(new.shape[1]):
            w, a = weights[n, t].item(), advantages[n].item()
            if w == 0:
                continue
            ratio = math.exp(new[n, t].item() - old[n, t].item())
            bounded = min(max(ratio, 1 - low), 1 + high)
            loss += w * -min(ratio * a, bounded * a)
            stats["ratio"] += w * ratio
            stats["clip_fraction"] += w * (bounded * a < ratio * a)
            stats["entropy"] += w * -new[n, t].item()
            if reference is not None:
                d = reference[n, t].item() - new[n, t].item()
                stats["kl"] += w * (math.exp(d) - d - 1)
    return loss + beta * stats["kl"], stats


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shares", [per_sequence, per_token])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_loss_is_that_of_a_loop_over_tokens(
    seed: int, shares: Callable[[Tensor], Tensor], beta: float
) -> None:
    new, old, reference, advantages, mask = ragged(seed)
    weights = shares(mask).double()
    out = grpo(new, old, reference if beta else None, advantages, weights, CLIP, beta)
    loss, stats = naive(new, old, reference if beta else None, advantages, weights, beta)
    assert out.loss.item() == pytest.approx(loss, abs=1e-9)
    assert {name: value.item() for name, value in out.stats.items()} == pytest.approx(
        {name: stats[name] for name in out.stats}, abs=1e-9
    )
    assert ("kl" in out.stats) == bool(beta)


# --- the first update is REINFORCE


@pytest.mark.parametrize("seed", range(3))
def test_without_old_the_ratio_is_exactly_one_and_nothing_is_clipped(seed: int) -> None:
    new, _, _, advantages, mask = ragged(seed)
    new = new.float().requires_grad_()
    assert (importance_ratio(new, new) == 1).all()
    out = grpo(new, None, None, advantages.float(), per_token(mask), CLIP, 0.0)
    assert out.stats["ratio"].item() == pytest.approx(1.0, abs=1e-6)
    assert out.stats["clip_fraction"].item() == 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shares", [per_sequence, per_token])
def test_without_old_the_gradient_is_that_of_reinforce(seed: int, shares: Callable[[Tensor], Tensor]) -> None:
    new, _, _, advantages, mask = ragged(seed)
    new.requires_grad_()
    weights = shares(mask).double()
    grpo(new, None, None, advantages, weights, CLIP, 0.0).loss.backward()
    # d/dlogp of sum w * -A * logp
    torch.testing.assert_close(new.grad, -advantages[:, None] * weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_old_is_with_old_equal_to_new(seed: int) -> None:
    new, _, reference, advantages, mask = ragged(seed)
    grads = []
    for old in (None, new.clone()):
        leaf = new.clone().requires_grad_()
        grpo(leaf, old, reference, advantages, per_token(mask).double(), CLIP, 0.1).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_no_gradient_reaches_old_reference_or_advantages() -> None:
    new, old, reference, advantages, mask = (
        t.requires_grad_() if t.is_floating_point() else t for t in ragged(0)
    )
    out = grpo(new, old, reference, advantages, per_token(mask).double(), CLIP, 0.1)
    out.loss.backward()
    assert new.grad.abs().sum() > 0
    assert (old.grad, reference.grad, advantages.grad) == (None, None, None)
    assert not any(value.requires_grad for value in out.stats.values())


# --- invariants


def test_shifting_all_rewards_of_a_group_changes_no_loss() -> None:
    new, old, _, _, mask = ragged(1)
    rewards = torch.tensor([[0.25, 0.5, 1.0], [0.0, 0.75, 0.75]], dtype=torch.float64)
    shift = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    losses = [
        grpo(
            new, old, None, group_relative(r, 1e-4).flatten(), per_token(mask).double(), CLIP, 0.0
        ).loss.item()
        for r in (rewards, rewards + shift)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert abs(losses[0]) > 1e-3


def test_groups_without_spread_move_nothing() -> None:
    new, old, _, _, mask = ragged(2)
    new.requires_grad_()
    advantages = group_relative(torch.full((2, 3), 0.1, dtype=torch.float64), 1e-4).flatten()
    out = grpo(new, old, None, advantages, per_sequence(mask).double(), CLIP, 0.0)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert (new.grad == 0).all()


def test_every_completion_twice_gives_the_same_loss() -> None:
    new, old, reference, advantages, mask = ragged(3)
    once = grpo(new, old, reference, advantages, per_sequence(mask).double(), CLIP, 0.1)
    twice = [torch.cat([t, t]) for t in (new, old, reference, advantages)]
    both = grpo(*twice, per_sequence(torch.cat([mask, mask])).double(), CLIP, 0.1)
    assert both.loss.item() == pytest.approx(once.loss.item(), abs=1e-7)
    assert both.stats["kl"].item() == pytest.approx(once.stats["kl"].item(), abs=1e-7)


def update_gradient(size: int, shares: Callable[[Tensor], Tensor]) -> tuple[Tensor, float, dict[str, float]]:
    """Return the gradient of one update of 8 samples with groups of 3, in parts of `size` samples."""
    noise = torch.Generator().manual_seed(5)
    rows, width, vocab = 24, 6, 11
    tokens = torch.randint(0, vocab, (rows, width), generator=noise)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=noise)
    theta = torch.randn(8, vocab, generator=noise).requires_grad_()
    prefix = Prefix(
        token_ids=torch.zeros(1, dtype=torch.long), token_types=torch.zeros(1, dtype=torch.long),
        pixels=torch.zeros(1, 1), positions=torch.zeros(3, 1, dtype=torch.long),
        grid=torch.ones(1, 3, dtype=torch.long), frame=Frame(1, 1),
    )  # fmt: skip
    experience = Experience(
        prefixes=[prefix] * 8,
        completions=Completions(tokens=tokens, mask=mask, texts=[""] * rows, finished=mask.any(1)),
        loss_mask=mask,
        advantages=group_relative(torch.rand(8, 3, generator=noise), 1e-4).reshape(-1, 1).expand(rows, width),
        old_logprobs=torch.log_softmax(torch.randn(rows, width, vocab, generator=noise), -1)[..., 0],
        reference_logprobs=-3 * torch.rand(rows, width, generator=noise),
    )
    weights, loss, stats = shares(mask), 0.0, dict[str, float]()
    for part, span in experience.split(size):
        owners = torch.arange(8).repeat_interleave(3)[span]
        logits = theta[owners].log_softmax(-1)[:, None].expand(-1, width, -1)
        new = logits.gather(-1, part.completions.tokens[..., None])[..., 0]
        out = grpo(
            new, part.old_logprobs, part.reference_logprobs, part.advantages, weights[span], CLIP, 0.04
        )
        out.loss.backward()
        loss += out.loss.item()
        stats = {name: stats.get(name, 0.0) + value.item() for name, value in out.stats.items()}
    return theta.grad, loss, stats


@pytest.mark.parametrize("shares", [per_sequence, per_token, per_group, per_budget])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_an_update_cut_into_parts_has_the_gradient_of_the_whole(
    size: int, shares: Callable[[Tensor], Tensor]
) -> None:
    whole, parts = update_gradient(8, shares), update_gradient(size, shares)
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-6)
    assert whole[0].abs().max() > 1e-3
    assert parts[1] == pytest.approx(whole[1], abs=1e-6)
    assert parts[2] == pytest.approx(whole[2], abs=1e-6)


# --- numbers that would not end well


@pytest.mark.parametrize("difference", [100.0, 1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_log_difference_far_out_does_not_overflow(difference: float, advantage: float) -> None:
    new = torch.tensor([[difference, -difference]], requires_grad=True)
    out = grpo(new, torch.zeros(1, 2), None, torch.tensor([advantage]), torch.full((1, 2), 0.5), CLIP, 0.0)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(new.grad).all()
    assert importance_ratio(new.detach(), torch.zeros(1, 2))[0].tolist() == pytest.approx(
        [math.exp(20), math.exp(-20)]
    )


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_an_impossible_token_off_the_mask_poisons_neither_loss_nor_stats(
    with_old: bool, with_reference: bool
) -> None:
    new, old, reference, advantages, mask = ragged(4)
    clean = grpo(
        new,
        old if with_old else None,
        reference if with_reference else None,
        advantages,
        per_token(mask).double(),
        CLIP,
        0.1,
    )
    poisoned = grpo(
        new.masked_fill(~mask, float("-inf")), old if with_old else None,
        reference if with_reference else None, advantages, per_token(mask).double(), CLIP, 0.1,
    )  # fmt: skip
    assert not mask.all()
    assert poisoned.loss.item() == clean.loss.item()
    assert {k: v.item() for k, v in poisoned.stats.items()} == {k: v.item() for k, v in clean.stats.items()}


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_an_impossible_token_off_the_mask_poisons_no_gradient(
    with_old: bool, with_reference: bool, everywhere: bool
) -> None:
    new, old, reference, advantages, mask = ragged(4)
    leaf = new.masked_fill(~mask, float("-inf")).requires_grad_()
    if everywhere:  # impossible for the policies that sampled and that anchor, too
        old, reference = (t.masked_fill(~mask, float("-inf")) for t in (old, reference))
    grpo(
        leaf, old if with_old else None, reference if with_reference else None, advantages,
        per_token(mask).double(), CLIP, 0.1
    ).loss.backward()  # fmt: skip
    assert (leaf.grad[~mask] == 0).all()
    assert torch.isfinite(leaf.grad[mask]).all()
    assert leaf.grad[mask].abs().sum() > 0


# --- shapes


def test_one_advantage_too_few_is_refused() -> None:
    new, old, _, advantages, mask = ragged(0)
    with pytest.raises(jaxtyping.TypeCheckError):
        grpo(new, old, None, advantages[:-1], per_token(mask).double(), CLIP, 0.0)
