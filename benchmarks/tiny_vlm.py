"""A random Qwen2.5-VL of 9.7 million parameters, for both sides of a benchmark.

Its proportions follow the 3B model. A 392x392 image is 196 tokens of a prompt of about 230, and completions
have 64 tokens. The vision tower costs two thirds of the language model's pass over the prompt. It is written
to a folder, so that every trainer loads it as it loads real weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, SIDE, GROUP, TOKENS = 4096, 392, 8, 64
QUERY = "Segment the object"
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def image(number: int, side: int = SIDE) -> np.ndarray:
    """Return noise, uint8 `[side, side, 3]`."""
    return np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)


def write(folder: Path, real: dict[str, Any] | None = None, side: int = SIDE) -> Path:
    """Write weights (seed 0), a tokenizer of bytes, and a processor.

    Args:
        folder: where.
        real: `text` and `vision`: sizes of a real policy instead of the tiny one's.
        side: of images.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    bytes_ = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    bytes_.pre_tokenizer, bytes_.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.padding_side = "left"
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1280, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    text = (real or {}).get("text", text) | {
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    vision = {
        "depth": 6, "hidden_size": 128, "intermediate_size": 344, "num_heads": 4, "out_hidden_size": 256,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [2, 5],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=(real or {}).get("vision", vision), tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        ids["<|im_end|>"],
        ids["<|endoftext|>"],
    )
    model.save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=side * side),
        tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(), chat_template=_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder
