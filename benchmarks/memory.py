"""What a GPU has to hold, term by term: the arithmetic, for the papers' policies on images of 768x768, bfloat16 passes.

`python benchmarks/memory.py` prints one JSON line per case, in GB (1e9 bytes). Parameters are counted on transformers' own classes
without memory; activations are those of the formulas below. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import json
from typing import Any

VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
PREFIX, COMPLETION = 729 + 300, 400  # 27x27 image tokens and Seg-R1's instruction; --max_completion_length
SAM2_LARGE = 224.4e6 * 4 + 1.5e9 + 64 * 8.4e6  # weights in float32, one 1024x1024 image in its encoder, 64 embeddings kept
CONTEXT = 1.0e9  # CUDA's own, and fragments
LOGITS = 2 * 2**26 * 4  # one chunk and its gradient


def config(size: dict[str, Any]) -> Any:
    """As transformers has it."""
    from transformers import Qwen2_5_VLConfig

    text = {**size, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    tower = {**VISION, "out_hidden_size": size["hidden_size"]}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=size["tie_word_embeddings"]
    )


def parameters(size: dict[str, Any]) -> dict[str, float]:
    """Numbers in the vision tower, in the language model's layers, and in embedding and head."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    tied = size["tie_word_embeddings"]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config(size))
    vision = sum(p.numel() for p in model.model.visual.parameters())
    words = size["vocab_size"] * size["hidden_size"] * (1 if tied else 2)
    every = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return {"vision": vision, "layers": every - vision - words, "words": words}


def adapter(size: dict[str, Any], rank: int) -> float:
    """Numbers in a low-rank adapter on all linear layers of the language model."""
    wide, inner, head = size["hidden_size"], size["intermediate_size"], size["hidden_size"] // size["num_attention_heads"]
    keys = head * size["num_key_value_heads"]
    return rank * size["num_hidden_layers"] * (2 * (wide + wide) + 2 * (wide + keys) + 3 * (wide + inner))


def activations(size: dict[str, Any], tokens: int, checkpointed: bool, stream: int) -> float:
    """Bytes kept for the backward pass of the language model.

    The residual stream of every layer, and inside of layers what products,
    norms, the activation and attention need (bfloat16); with gradient checkpointing the inside of one layer at a time.
    """
    wide, inner = size["hidden_size"], size["intermediate_size"]
    keys = wide // size["num_attention_heads"] * size["num_key_value_heads"]
    inside = tokens * 2 * (4 * wide + 2 * (wide + 2 * keys) + 4 * inner) + tokens * stream * 2 * wide
    kept = tokens * stream * wide * size["num_hidden_layers"]
    return kept + (inside if checkpointed else inside * size["num_hidden_layers"])


def case(name: str, size: dict[str, Any], group: int, lora: int | None, ranks: int, checkpointed: bool, reference: bool) -> None:
    """One JSON line: a prompt and its group in one pass."""
    of, tokens = parameters(size), PREFIX + group * COMPLETION
    every = sum(of.values())
    numbers = every if lora is None else adapter(size, lora)
    weights = every * (4 if lora is None else 2) + (0 if lora is None else numbers * 4)
    kv = 2 * 2 * size["num_hidden_layers"] * size["hidden_size"] // size["num_attention_heads"] * size["num_key_value_heads"]
    always = {
        "weights": weights, "gradients, shared out": numbers * 4 / ranks, "AdamW, shared out": numbers * 8 / ranks, "SAM2-L": SAM2_LARGE,
        "context": CONTEXT, "reference": every * 4.0 if reference and lora is None else 0.0,
    }  # fmt: skip
    head = of["words"] * 4 if lora is not None else 0.0  # the frozen head in float32
    sampling = {"decoder's copy": of["layers"] * 2.0, "keys and values": kv * (PREFIX + group * COMPLETION), "head in float32": head}
    update = {
        "activations": activations(size, tokens, checkpointed, 2 if lora else 4),
        "activations of the tower": 0.0 if lora else 2916 * 2 * VISION["depth"] * (8 * 1280 + 3 * 3420),
        "logits": LOGITS, "head in float32": head, "a bucket of gradients": 0.0 if lora else 1e9,
    }  # fmt: skip
    gb = {key: round(value / 1e9, 2) for key, value in {**always, **sampling, **update}.items()}
    print(json.dumps({
        "case": name, "group": group, "prefix": PREFIX, "completion": COMPLETION, "ranks": ranks, "gradient_checkpointing": checkpointed,
        "gb": gb, "sampling_gb": round(sum((always | sampling).values()) / 1e9, 1), "update_gb": round(sum((always | update).values()) / 1e9, 1),
    }))  # fmt: skip


def main() -> None:
    """The cases that the documents speak of."""
    small, large = SIZES.values()
    case("3B, LoRA of rank 64, one GPU", small, 8, 64, 1, True, True)
    case("3B, LoRA of rank 64, one GPU, activations kept", small, 8, 64, 1, False, True)
    case("3B, all weights, ZeRO-2 on 8 GPUs, a frozen copy", small, 8, None, 8, False, True)
    case("3B, all weights, ZeRO-2 on 8 GPUs, no reference", small, 8, None, 8, False, False)
    case("7B, all weights, ZeRO-2 on 8 GPUs, a frozen copy", large, 8, None, 8, True, True)
    case("7B, all weights, ZeRO-2 on 8 GPUs, no reference", large, 8, None, 8, True, False)


if __name__ == "__main__":
    main()
