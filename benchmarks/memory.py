"""Count the memory that a GPU needs for the papers' runs: sampling and one update, on tensors without
contents.

`python benchmarks/memory.py` prints one JSON line per run, in GB (1e9 bytes). With
`"+experiment=grpo_cod10k_lora stage.group_size=16"` it counts a run of your own.

segrl's own code runs on tensors that have shapes and no contents (torch's FakeTensor): forward pass, backward
pass and AdamW. The bytes of every tensor are counted as it is made and freed, so no GPU is needed and nothing
is computed. Only two things are added by hand: CUDA's own gigabyte, and what ZeRO shards over 8 ranks (ZeRO-3
with torch's own linear layers). Every completion has its full length.

Not counted: fragments of the allocator, working memory of libraries, pieces of groups
(`stage.completions_per_pass`), and drawing masks, for which the sampler's memory is free again.

`--check` runs two updates of a tiny policy twice, with contents and without: the peaks must agree to one part
in 100,000.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import no_contents
import tiny_vlm
import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CASES = (
    "+experiment=sft_fcot trainer=deepspeed_zero2 data.batch_size=16 policy.gradient_checkpointing=true",
    "+experiment=grpo_cod10k trainer=deepspeed_zero2 data.batch_size=3 policy.gradient_checkpointing=true",
    "+experiment=grpo_cod10k trainer=deepspeed_zero2 data.batch_size=3",
    "+experiment=prerl_dis5k trainer=deepspeed_zero2 data.batch_size=3",
    "+experiment=seg_zero_refcocog trainer=deepspeed_zero2 data.batch_size=2 "
    "policy.gradient_checkpointing=true",
    "+experiment=sam_r1_refcocog trainer=deepspeed_zero2 data.batch_size=4 "
    "policy.gradient_checkpointing=true",
    "+experiment=vision_reasoner_multi trainer=deepspeed_zero2 data.batch_size=2 "
    "policy.gradient_checkpointing=true",
    "+experiment=sam_r1_refcocog trainer=deepspeed_zero3 data.batch_size=4 "
    "policy.gradient_checkpointing=true",
    "+experiment=vision_reasoner_multi trainer=deepspeed_zero3 data.batch_size=2 "
    "policy.gradient_checkpointing=true",
    "+experiment=sft_fcot policy.gradient_checkpointing=true",
    "+experiment=grpo_cod10k",
    "+experiment=seg_zero_refcocog policy.gradient_checkpointing=true",
    "+experiment=sft_fcot_lora",
    "+experiment=grpo_cod10k_lora",
    "+experiment=sam_r1_refcocog_lora",
    "+experiment=sam_r1_refcocog_lora policy=qwen2_5_vl_7b",
)
EVALUATED = 16  # data.eval_batch_size
CONTEXT = 1.0e9  # CUDA's own
# Bytes of DeepSpeed's reduce_bucket_size and stage3_max_live_parameters, in float32.
BUCKET, GATHERED = 20e8, 40e8


def at_work(_: Tensor, query: Tensor, key: Tensor, *others: Tensor) -> int:
    """Return the bytes that FlashAttention 2 takes inside its backward pass.

    These are sums for queries, and gradients of keys and values for each head of queries.
    """
    heads, width = query.shape[1:]
    segments = next(len(ends) - 1 for ends in others if ends.dtype == torch.int32)
    sums = (len(query) + 128 * segments) * heads * -(-width // 32) * 32 * 4
    return sums + (2 * len(key) * heads * width * key.element_size() if key.shape[1] < heads else 0)


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = dict[int, int]()
        self.now = self.peak = 0

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """Subtract a storage that was freed."""
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it returns."""
        args = no_contents.with_places(function, args)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        if "_varlen_attn_backward" in str(function):
            self.peak = max(self.peak, self.now + at_work(*[t for t in args if isinstance(t, Tensor)]))
        return out


def held(module: nn.Module) -> Ledger:
    """Return a ledger that begins with what a module holds."""
    ledger = Ledger()
    for tensor in (*module.parameters(), *module.buffers()):
        ledger.note(tensor)
    return ledger


def sampling(
    ledger: Ledger, policy: Any, prefixes: list[Any], group: int, length: int, kernel: bool = True
) -> int:
    """Return the most bytes while groups are sampled, including what stays."""
    from segrl.rollout.shared_prefix import sample_tokens

    rows = len(prefixes) * group
    ledger.peak = ledger.now
    with ledger, no_contents.as_on_a_gpu(kernel), torch.no_grad():
        state = policy.prefill(prefixes)
        decoder, head = policy.decoder(state, group, length, stride=128), policy.head()
        del state
        decoder.place = length - 1
        hidden = decoder.step(torch.zeros(rows, dtype=torch.long))
        sample_tokens(policy.logits(hidden, head).softmax(-1), torch.zeros(rows, dtype=torch.float64))
    return ledger.peak


def learning(
    ledger: Ledger, policy: Any, prefixes: list[Any], group: int, length: int, shared_out: bool
) -> tuple[int, Any]:
    """Return the most bytes in a pass and its update, including what stays; and the optimizer.

    If `shared_out`, gradients are freed as soon as they are whole and the optimizer makes no moments.
    """
    from segrl.types import Completions

    learns = [p for p in policy.parameters() if p.requires_grad]
    tokens = torch.full((len(prefixes) * group, length), 100)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completions = Completions(tokens=tokens, mask=mask, texts=[""] * len(tokens), finished=mask[:, 0])
    optimizer = torch.optim.AdamW(learns, foreach=True)
    if shared_out:  # a gradient goes as soon as it is whole
        for parameter in learns:
            parameter.register_post_accumulate_grad_hook(lambda whole: setattr(whole, "grad", None))
    for _ in range(1 if shared_out else 2):  # the first update leaves the moments
        ledger.peak = ledger.now
        with ledger:
            policy.logprobs(prefixes, completions).sum().backward()
            if not shared_out:
                optimizer.step()
        optimizer.zero_grad()
    return ledger.peak, optimizer


def check(folder: Path) -> None:
    """Print one JSON line per case: the most bytes in an update and in sampling of the tiny policy.

    The counts with contents and without must be equal, but for a few counters.
    """
    from transformers import AutoConfig

    from segrl.models.hf_vlm import HFPolicy

    for lora in (None, {"rank": 64, "alpha": 64, "dropout": 0.0}):
        settings = {
            "lora": lora,
            "dtype": "bfloat16" if lora else "float32",
            "train_vision": lora is None,
            "gradient_checkpointing": lora is not None,
        }
        peaks = []
        for learner in (
            HFPolicy(str(folder), None, None, 1.0, **settings),
            no_contents.emptied(no_contents.policy(folder, AutoConfig.from_pretrained(folder), settings)),
        ):
            ledger, prefixes = held(learner), no_contents.prefixes_of(learner, tiny_vlm.SIDE, 2)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                learned, optimizer = learning(ledger, learner, prefixes, 4, 200, False)
            peaks.append(
                {"learning": learned, "sampling": sampling(ledger, learner, prefixes, 4, 200, False)}
            )
            del optimizer
        print(json.dumps({"lora": lora is not None, "contents": peaks[0], "no_contents": peaks[1]}))
        if any(abs(peaks[0][part] / peaks[1][part] - 1) > 1e-5 for part in peaks[0]):
            sys.exit(1)


def mask_head(images: int, kept: int) -> tuple[int, int]:
    """Return the bytes of SAM 2.1 Large in float32 with its cached embeddings, and of its encoder.

    The encoder works on so many images at once.
    """
    from segrl.models.sam2_head import _ENCODED, _build

    model = no_contents.emptied(_build("configs/sam2.1/sam2.1_hiera_l.yaml").eval().to("meta"))
    ledger, at_once = held(model), min(images, _ENCODED // 1024**2)
    weights = ledger.now
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, torch.no_grad():
        out = model.forward_image(torch.zeros(at_once, 3, 1024, 1024))
    embedding = sum(level.untyped_storage().nbytes() for level in out["backbone_fpn"]) // at_once
    stacked = images * embedding  # those of a batch, once more
    return weights + kept * embedding, ledger.peak - weights + stacked


def reference(folder: Path, size: dict[str, Any], settings: dict[str, Any]) -> int:
    """Return the bytes of a frozen copy."""
    from segrl.models.reference import FrozenCopy

    frozen = FrozenCopy.__new__(FrozenCopy)
    nn.Module.__init__(frozen)
    frozen.policy = no_contents.policy(folder, no_contents.config(size), settings)
    frozen.made_for(torch.bfloat16)
    return held(frozen).now


def composed(overrides: str) -> tuple[Any, dict[str, Any], int | None]:
    """Return the configuration of a command line, the shape of its policy, and its level of ZeRO.

    Exits with 2 for what is not counted here.
    """
    from segrl.runs.command import refusal

    command = [sys.executable, "-m", "segrl.train", *overrides.split(), "--cfg", "job", "--resolve"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    cfg: Any = OmegaConf.create(done.stdout if done.returncode == 0 else {})
    wrong = done.stderr.strip()
    if done.returncode == 0:
        wrong = " ".join(refusal("train", overrides.split(), only_keys=True) or [])
    strategy, size = OmegaConf.select(cfg, "trainer.strategy"), None
    if done.returncode == 0:
        size = next((size for name, size in no_contents.SIZES.items() if name in cfg.policy.weights), None)
    zero = strategy.zero_stage if OmegaConf.is_dict(strategy) and "zero_stage" in strategy else None
    refusals = {
        wrong: bool(wrong),
        f"policy: one of {', '.join(no_contents.SIZES)} is needed: "
        "others have not been given a shape here": size is None,
        "stage.completions_per_pass: null is needed: groups are counted whole": OmegaConf.select(
            cfg, "stage.completions_per_pass"
        )
        is not None,
        "stage: one without a critic is needed": OmegaConf.select(cfg, "stage.critic") is not None,
        "trainer: one GPU or ZeRO-2 or 3 is needed": zero not in (2, 3) and strategy not in (None, "auto"),
        "rollout: shared_prefix is needed": "shared_prefix"
        not in str(OmegaConf.select(cfg, "rollout._target_")),
    }
    for line, holds in refusals.items():
        if holds:
            print(line, file=sys.stderr)
            sys.exit(2)
    assert size is not None
    return cfg, size, zero


def case(folder: Path, overrides: str) -> None:
    """Print one JSON line: the memory that a command line of `python -m segrl.train` takes of each GPU.

    Counted are the second update and the rollout after it.
    """
    cfg, size, zero = composed(overrides)
    names = ("lora", "dtype", "train_vision", "gradient_checkpointing")
    settings = {name: OmegaConf.to_container(cfg.policy)[name] for name in names}
    batch, group, length = cfg.data.batch_size, cfg.stage.get("group_size"), cfg.rollout.max_tokens
    sampled_at_once = cfg.rollout.prefixes_at_once or batch
    if group is None:  # imitation samples to evaluate alone
        batch, group, sampled_at_once = cfg.stage.micro_batch_size, 1, min(sampled_at_once, EVALUATED)
    frozen = "FrozenCopy" in str(cfg.reference) and cfg.stage.kl_weight + cfg.stage.kl_reward > 0
    learner = no_contents.emptied(no_contents.policy(folder, no_contents.config(size), settings))
    numbers = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    ledger, prefixes = (
        held(learner),
        no_contents.prefixes_of(learner, cfg.policy.image_side, max(batch, sampled_at_once)),
    )
    weights, head = ledger.now, mask_head(len(prefixes), cfg.head.embeddings_kept)
    copy = reference(folder, size, settings) if frozen else 0
    with no_contents.as_on_a_gpu():
        learned, optimizer = learning(
            ledger, learner, prefixes[: cfg.stage.micro_batch_size], group, length, zero is not None
        )
    moments = ledger.now - weights
    sampled = sampling(ledger, learner, prefixes[:sampled_at_once], group, length) + head[1]
    del optimizer
    sampled += (
        copy // 8 if zero == 3 else copy
    )  # ZeRO-3 gathers it behind the rollout, when the policy's weights are shared out again
    learned += copy // 8 - weights + GATHERED if zero == 3 else copy
    stays = head[0] + CONTEXT + sum(p.pixels.nbytes for p in prefixes)
    if zero:  # of each rank its share of gradients, main weights and two moments
        stays += numbers * 16 / 8 + BUCKET
    parts = {
        "weights": weights,
        "moments": moments,
        "frozen copy": copy,
        "SAM 2": head[0],
        "what else stays": stays - head[0],
    }
    print(json.dumps({
        "run": overrides, "prefix": len(prefixes[0].token_ids), "prefixes": batch,
        "sampled_at_once": sampled_at_once, "group": group, "completion": length,
        "gb": {name: round(value / 1e9, 2) for name, value in parts.items()},
        "while_sampling_gb": round((stays + sampled) / 1e9, 1),
        "while_learning_gb": round((stays + learned) / 1e9, 1),
    }), flush=True)  # fmt: skip


def main() -> None:
    """Count the cases that the documents name, or those of the command line."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        return print(__doc__)
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    folder = tiny_vlm.write(Path(tempfile.mkdtemp()) / "policy", side=840)
    if sys.argv[1:] == ["--check"]:
        return check(folder)
    for overrides in sys.argv[1:] or CASES:
        case(folder, overrides)
    return None


if __name__ == "__main__":
    main()
