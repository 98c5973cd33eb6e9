"""Policies over transformers: Qwen2.5-VL and Qwen3-VL, chosen by the `model_type` of the weights' folder."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from segrl.models.hf_folder import family_of, whole_model
from segrl.models.kernels import window_attention
from segrl.models.kernels.cuda_graph import GraphRecorder
from segrl.models.kernels.decoder import Decoder, PackedLinear, linear_weight
from segrl.models.kernels.onednn_linear import take_products
from segrl.models.kernels.prefix_pass import grouped_attention, read_prefixes, read_suffixes
from segrl.models.kernels.rms_norm import fuse_norms
from segrl.models.kernels.suffix_attention import pass_dtype
from segrl.models.kernels.token_logprobs import float32_products, may_round, token_logprobs
from segrl.models.kernels.vision_tower import image_features, rotary_positions
from segrl.prompts.frames import absolute_pixels, permille
from segrl.protocols import Message
from segrl.types import Completions, Frame, Prefix, PrefixState


class Lora(TypedDict):
    """A low-rank adapter (arXiv 2106.09685)."""

    rank: int
    alpha: int
    dropout: float


class HFEncoder:
    """Processor and coordinate frame of one model family; holds no weights.

    Args:
        weights: folder with the processor's files.
        image_side: images are first resized to a square with this side, as Seg-R1 does. None: they are not.
        pixel_budget: smallest and largest number of pixels after the processor's resizing. If None, those of
            the folder.
    """

    def __init__(self, weights: str, image_side: int | None, pixel_budget: tuple[int, int] | None) -> None:
        from transformers import AutoProcessor

        family = family_of(weights)
        budget = {} if pixel_budget is None else {
            "size": {"shortest_edge": pixel_budget[0], "longest_edge": pixel_budget[1]}
        }  # fmt: skip
        self.processor = AutoProcessor.from_pretrained(weights, local_files_only=True, **budget)
        added = self.processor.tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special and len(token.content) > 1]
        self.image_side = image_side
        self.frame_of: Callable[[int, int], Frame] = permille if family == "qwen3_vl" else absolute_pixels

    def encode(self, messages: Sequence[Message], image: np.ndarray) -> Prefix:
        """Return the prefix of a chat and an RGB image, uint8 `[H, W, 3]`."""
        picture = Image.fromarray(image)
        if self.image_side is not None and picture.size != (self.image_side, self.image_side):
            picture = picture.resize((self.image_side, self.image_side), Image.Resampling.BICUBIC)
        text = self.processor.apply_chat_template(
            self._as_text(messages), tokenize=False, add_generation_prompt=True
        )
        out = self.processor(text=[text], images=[picture], return_tensors="pt")
        grid, eyes = out["image_grid_thw"], self.processor.image_processor
        types, patch = out["mm_token_type_ids"][0].long(), eyes.patch_size
        return Prefix(
            token_ids=out["input_ids"][0], token_types=types, pixels=out["pixel_values"],
            positions=rotary_positions(types, grid, eyes.merge_size), grid=grid,
            frame=self.frame_of(int(grid[0, 1]) * patch, int(grid[0, 2]) * patch),
        )  # fmt: skip

    def _as_text(self, messages: Sequence[Message]) -> list[Message]:
        """Return the chat with the names of special tokens in its texts broken up; see `spelled`."""
        chat: list[Message] = []
        for message in messages:
            content = message["content"]
            assert isinstance(content, list), "grammars write their messages as lists of parts"
            parts = [{**p, "text": self.spelled(p["text"])} if "text" in p else p for p in content]
            chat.append({**message, "content": parts})
        return chat

    def spelled(self, text: str) -> str:
        """Return the text with a space after the first character of each special token's name.

        So the name is tokenized as ordinary text and not as an image or a stop.
        """
        for word in self._special:
            text = text.replace(word, f"{word[0]} {word[1:]}")
        return text

    def answer(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 `[T]`, the stop token last."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(self.spelled(text), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, tokenizer.eos_token_id])

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Return the N texts of tokens int64 `[N, T]` under a token mask, without special tokens."""
        rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
        texts: list[str] = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def token_at(self, tokens: Tensor, end: int) -> int:
        """Return the index of the token that completes the first `end` characters, found by bisection."""
        ids, tokenizer = tokens.tolist(), self.processor.tokenizer

        def length(count: int) -> int:
            return len(tokenizer.decode(ids[:count], skip_special_tokens=True))

        return bisect_left(range(1, len(ids) + 1), end, key=length)


class HFPolicy(nn.Module):
    """The MLLM being trained, loaded from a Hugging Face folder.

    Sampling and training use the same distribution: one temperature, and probability zero for the tokens of
    `never_sampled` (placeholders of images and videos, and rows of the head without a token).

    Args:
        weights: folder of a Qwen2.5-VL or Qwen3-VL checkpoint.
        image_side, pixel_budget: see `HFEncoder`.
        temperature: divides the logits, in sampling and in every log-probability.
        dtype: of the weights, a torch name such as "bfloat16".
        lora: settings of an adapter on the language model, which is trained instead of the weights. If None,
            the weights are trained.
        train_vision: whether the vision tower is trained, too; ignored with `lora`.
        gradient_checkpointing: whether the backward pass recomputes the activations inside layers.
    """

    def __init__(
        self,
        weights: str,
        image_side: int | None,
        pixel_budget: tuple[int, int] | None,
        temperature: float,
        dtype: str,
        lora: Lora | None,
        train_vision: bool,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        self.encoder = HFEncoder(
            weights, image_side, None if pixel_budget is None else (pixel_budget[0], pixel_budget[1])
        )
        self.model = whole_model(weights, getattr(torch, dtype))
        self.model.train()  # from_pretrained sets evaluation mode, in which no layer is checkpointed
        fuse_norms(self.model)
        take_products(self.model)
        AttentionInterface.register(window_attention.NAME, window_attention.window_attention)
        self.model.model.visual.config._attn_implementation = window_attention.NAME
        AttentionInterface.register("segrl_grouped", grouped_attention)
        AttentionMaskInterface.register("segrl_grouped", sdpa_mask)
        self.model.model.language_model.config._attn_implementation = "segrl_grouped"
        self.weights, self.temperature, self.lora = weights, temperature, lora
        self.weights_version = 0  # number of changes of the weights
        self.register_load_state_dict_post_hook(lambda *_: self.bump_version())
        self.model.model.visual.requires_grad_(train_vision)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.model.model.visual.gradient_checkpointing_enable(
                {"use_reentrant": False, "preserve_rng_state": False}  # the tower uses no random numbers
            )
        if lora is not None:
            self.model.requires_grad_(False)
            self.add_adapter("policy", lora)
        tokenizer, config = self.encoder.processor.tokenizer, self.model.config
        self.pad_id, self.image_token_id = int(tokenizer.pad_token_id), int(config.image_token_id)
        text = config.get_text_config()
        self.hidden_size, self.most_positions = int(text.hidden_size), int(text.max_position_embeddings)
        self.never_sampled: Tensor
        self.stop_ids: Tensor
        # The generation configuration may list more stop tokens than the tokenizer, e.g. <|endoftext|>.
        declared = self.model.generation_config.eos_token_id
        stops = {
            int(tokenizer.eos_token_id),
            *(declared if isinstance(declared, list) else [declared or self.pad_id]),
        }
        self.register_buffer("stop_ids", torch.tensor(sorted(stops)), persistent=False)
        placeholders = [
            config.image_token_id, config.video_token_id, config.vision_start_token_id,
            config.vision_end_token_id,
            *range(len(tokenizer), self.model.get_input_embeddings().num_embeddings),
        ]  # fmt: skip
        self.register_buffer("never_sampled", torch.tensor(placeholders), persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return cast("torch.device", self.stop_ids.device)

    @property
    def output_layer(self) -> nn.Module:
        """The layer whose product gives the logits; always in float32."""
        return cast("nn.Module", self.model.lm_head)

    @property
    def pass_dtype(self) -> torch.dtype:
        """The precision of its passes: the autocast dtype if autocast is on, else that of the weights."""
        return pass_dtype(self.model)

    def bump_version(self) -> None:
        """Count a change of the weights, so that engines renew their copies."""
        self.weights_version += 1

    def features(self, prefix: Prefix) -> Tensor:
        """Return the tower's features of a prefix's image, `[n, D * (1 + levels)]` for n image tokens.

        Qwen3-VL has features of some earlier layers (levels) beside those of the last; Qwen2.5-VL has none.
        """
        seen = image_features(self.model.model, [prefix])
        levels = [seen.pooler_output, *(seen.get("deepstack_features") or ())]
        return torch.cat([torch.cat(level) for level in levels], 1)

    def fingerprint(self) -> str:
        """Return a hash of up to 63 entries of each parameter, and of the adapter's settings.

        Ranks and runs with the same weights get the same hash.
        """
        few = [p.detach().flatten()[:: max(1, p.numel() // 32)].float() for p in self.model.parameters()]
        entries = torch.cat(few).cpu().numpy().tobytes()
        return hashlib.blake2b(entries + repr(self.lora).encode(), digest_size=16).hexdigest()

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight by its name in a Hugging Face folder, with the active adapter merged."""
        for name, value in self.model.state_dict().items():
            place, inner, last = name.rpartition(".base_layer.")
            if inner:
                layer = self.model.get_submodule(place)
                yield f"{place}.{last}", linear_weight(layer) if last == "weight" else value
            elif ".lora_" not in name:
                yield name, value

    def prefill(self, prefixes: Sequence[Prefix]) -> PrefixState:
        """Read each prefix once: pixels through the vision tower, tokens through the language model."""
        return read_prefixes(self.model.model, prefixes, self.pad_id, self.gradient_checkpointing)

    def decoder(
        self, state: PrefixState, group_size: int, length: int, stride: int | None = None,
        recorder: GraphRecorder | None = None,
    ) -> Decoder:  # fmt: skip
        """Return a `Decoder` of completions after `state`, with the present weights, in `pass_dtype`."""
        language = self.model.model.language_model
        return Decoder(language, state, group_size, length, self.pass_dtype, stride, recorder)

    def head_weight(self) -> Tensor:
        """Return the head's weight, float32 `[V, D]`."""
        weight: Tensor = self.model.lm_head.weight
        return weight.float()

    def head(self) -> PackedLinear:
        """Return the head for sampling, float32, detached; its bias is -inf at `never_sampled`, else 0."""
        weight = self.head_weight().detach()
        return PackedLinear(
            weight, weight.new_zeros(len(weight)).index_fill_(0, self.never_sampled, float("-inf"))
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor, head: PackedLinear) -> Tensor:
        """Return logits divided by the temperature, float32 `[N, V]`; minus infinity on `never_sampled`.

        Args:
            hidden: `[N, D]`, hidden states that predict the tokens.
            head: from `head()`, made once for all steps.
        """
        with float32_products(hidden.device, may_round(hidden.device)):
            return head(hidden.float() / self.temperature)

    def read(
        self, prefixes: Sequence[Prefix], completions: Completions, state: PrefixState | None = None
    ) -> Tensor:
        """Return hidden states `[N, T, D]`, each of which predicts the completion token of the same index.

        Each prefix is read once for its group, or not at all if `state` is given. The last hidden state of
        the prefix predicts the first token.
        """
        state = state or self.prefill(prefixes)
        first = state.last_hidden.repeat_interleave(len(completions.tokens) // len(prefixes), 0)[:, None]
        if completions.tokens.shape[1] == 1:
            return first
        said, real = completions.tokens[:, :-1], completions.mask[:, 1:]
        behind = read_suffixes(self.model.model, state, said, real, self.gradient_checkpointing)
        return torch.cat([first, behind], 1)

    def logprobs_of(self, hidden: Tensor, completions: Completions) -> Tensor:
        """Return the log-probability of each completion token, float32 `[N, T]`, from the states of `read`.

        It is zero outside of the token mask.
        """
        mask, weight = completions.mask, self.head_weight()
        states = hidden[mask].float() / self.temperature
        picked = token_logprobs(states, weight, completions.tokens[mask], self.never_sampled)
        return torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, picked)

    def logprobs(
        self, prefixes: Sequence[Prefix], completions: Completions, state: PrefixState | None = None
    ) -> Tensor:
        """Return the log-probability of each completion token, float32 `[N, T]`; see `logprobs_of`."""
        return self.logprobs_of(self.read(prefixes, completions, state), completions)

    def load_policy(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of an earlier stage: all, or those of an adapter. A critic's are ignored.

        Raises:
            ValueError: if they belong to another architecture, or to an adapter and this policy has none.
        """
        if self.lora is None and any(".lora_" in name for name in weights):
            raise ValueError(
                "policy.lora: must be set for weights of an adapter; got null (set it as it was trained, or "
                "export them and set policy.weights)"
            )
        names = {name.replace(".base_layer.", "."): name for name in self.state_dict()}
        found = {names.get(name, name): value for name, value in weights.items() if ".critic." not in name}
        try:
            missing, unexpected = self.load_state_dict(found, strict=False)
        except RuntimeError as error:
            raise ValueError((str(error).splitlines()[1:] or [str(error)])[0].strip()[:160]) from None
        adapter = any(".lora_" in name for name in found)
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        needed = [name for name in missing if ".lora_" not in name and not (adapter or name in frozen)]
        if unexpected or needed:
            raise ValueError(f"it has no {needed[0]}" if needed else f"it also has {unexpected[0]}")

    def add_adapter(self, name: str, lora: Lora) -> None:
        """Add a trainable low-rank adapter, initially zero, to the linear layers of the language model."""
        from peft import LoraConfig

        layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        config = LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=layers
        )
        self.model.add_adapter(config, adapter_name=name)
        for place, parameter in self.model.named_parameters():
            if ".lora_" in place:  # float32, because small updates would be rounded away in bfloat16
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    def save(self, folder: Path, max_tokens: int) -> None:
        """Write a Hugging Face folder; an adapter is merged into this policy's weights first.

        Args:
            folder: where to write.
            max_tokens: of a completion. The generation configuration has it, greedy decoding without
                penalties and the stop tokens, so that other tools generate as segrl evaluates.
        """
        if self.lora is not None:
            from peft.tuners.tuners_utils import BaseTunerLayer

            for place, layer in list(self.model.named_modules()):
                if isinstance(layer, BaseTunerLayer):
                    layer.merge(adapter_names=["policy"])
                    parent, _, name = place.rpartition(".")
                    setattr(self.model.get_submodule(parent), name, layer.get_base_layer())
            self.model._hf_peft_config_loaded = False  # transformers' flag of a model that has adapters
            self.lora = None
        from transformers import GenerationConfig

        stops = self.stop_ids.tolist()
        self.model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, eos_token_id=stops, pad_token_id=self.pad_id
        )
        self.model.save_pretrained(folder)
        self.encoder.processor.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # safetensors makes them readable for their owner only
            file.chmod((folder / "config.json").stat().st_mode)

    @contextmanager
    def adapter_active(self, adapter: str | None) -> Iterator[None]:
        """Activate `adapter` in the context; if None, turn all off. Restore the policy's own afterwards."""
        assert self.lora is not None, "without adapters there is nothing to change"
        if adapter is None:
            self.model.disable_adapters()
        else:
            self.model.set_adapter(adapter)
        try:
            yield
        finally:
            self.model.enable_adapters()
            self.activate_policy_adapter()

    def activate_policy_adapter(self) -> None:
        """Activate the policy's own adapter, and unfreeze all adapters: peft freezes inactive ones."""
        self.model.set_adapter("policy")
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(True)
