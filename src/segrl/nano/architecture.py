"""Build Qwen-VL models of nano size offline: configuration, tokenizer, processor.

The classes are transformers' own; only widths, depths and the vocabulary are smaller. The result is an
ordinary Hugging Face folder, so the adapter that loads Qwen2.5-VL-3B also loads the nano policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

IMAGE_SIDE = 128
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`, in which each integer 0..1000 is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=1400, min_frequency=2, max_token_length=48, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    learner.train_from_iterator(texts, trainer)
    import json

    learned = json.loads(learner.to_str())["model"]
    words = dict.fromkeys([*learned["vocab"], *(str(i) for i in range(1001))])
    merges = [tuple(pair) for pair in learned["merges"]]
    bpe = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in zip(keys, names, strict=True)
    }


def _text_width(tokenizer: PreTrainedTokenizerFast, sections: list[int], **axes: bool) -> dict[str, object]:
    """Return the configuration of the language model: 3 layers of width 128, 4 heads, 2 key-value heads."""
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **axes},
        "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def _processor(kind: type, tokenizer: PreTrainedTokenizerFast, patch: int, side: int) -> ProcessorMixin:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    budget = {"shortest_edge": side * side, "longest_edge": side * side}
    images = Qwen2VLImageProcessor(
        patch_size=patch, merge_size=2, size=budget, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return kind(images, tokenizer, Qwen2VLVideoProcessor(patch_size=patch), chat_template=_CHAT)


def qwen3_vl(texts: Sequence[str]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build Qwen3-VL for images of 128 px with patches of 16 px: 16 image tokens.

    The weights are random, so torch must be seeded before.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    tokenizer, patch = _tokenizer(texts), 16
    patches = (IMAGE_SIDE // patch) ** 2
    config = Qwen3VLConfig(
        # transformers assumes interleaved position ids; vLLM reads this key.
        text_config=_text_width(tokenizer, [4, 6, 6], mrope_interleaved=True),
        vision_config={
            "depth": 3, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "out_hidden_size": 128,
            "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "num_position_embeddings": patches, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.05,
        },
        tie_word_embeddings=True, **_token_ids(tokenizer),
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():  # with transformers' smaller values, so narrow a tower does not learn positions
        model.model.visual.pos_embed.weight.normal_(0, 0.3)
    return model, _processor(Qwen3VLProcessor, tokenizer, patch, IMAGE_SIDE)


def qwen2_5_vl(texts: Sequence[str]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build Qwen2.5-VL for images of 112 px with patches of 14 px: 16 image tokens.

    The weights are random, so torch must be seeded before.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = _tokenizer(texts)
    config = Qwen2_5_VLConfig(
        text_config=_text_width(tokenizer, [4, 6, 6]),
        vision_config={
            "depth": 3, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "out_hidden_size": 128,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
            "fullatt_block_indexes": [1, 2], "initializer_range": 0.05,
        },
        tie_word_embeddings=True, **_token_ids(tokenizer),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), _processor(Qwen2_5_VLProcessor, tokenizer, 14, 112)


def write(folder: Path, built: tuple[PreTrainedModel, ProcessorMixin]) -> Path:
    """Save a model and its processor as a Hugging Face folder; return the folder."""
    for part in built:
        part.save_pretrained(folder)
    return folder


def vocabulary_texts(instructions: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Return the texts for training the tokenizer: instructions, twice, and the words of the answers.

    Answers are split after each blank, so that no token spans several of their words.
    """
    words = itertools.chain.from_iterable(answer.replace(" ", " \x00").split("\x00") for answer in answers)
    return [*instructions, *instructions, *words]
