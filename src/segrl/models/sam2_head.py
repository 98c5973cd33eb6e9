"""The frozen mask head: SAM 2, loaded once, each image encoded once, all prompts decoded in batched calls.

The only file that imports `sam2`. That package initialises Hydra's global state on import, and its own builder
composes on the application's search path; so it is imported inside functions, with the state saved and restored,
and built from its packaged YAML by `instantiate`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segrl.host import digests
from segrl.host.foreign import strange
from segrl.models.embedding_cache import Embeddings, fingerprint
from segrl.models.kernels.first_use import FAILURES, give_up
from segrl.models.kernels.pinned import sent
from segrl.types import MaskPrompt

# What `build_sam2(apply_postprocessing=True)` adds: fall back to the best of three masks if the one is not stable.
_POSTPROCESSING = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
_ENCODED = (
    4 * 1024**2
)  # pixels in one call of the encoder: a GPU has enough to do, and each million takes 0.4 GB
Precision = Literal["float32", "bfloat16"]
_PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


_PARTS = [
    f"sam2.modeling.{name}" for name in (
        "sam2_base.SAM2Base", "backbones.hieradet.Hiera", "backbones.image_encoder.FpnNeck", "backbones.image_encoder.ImageEncoder",
        "memory_attention.MemoryAttention", "memory_attention.MemoryAttentionLayer", "memory_encoder.CXBlock", "memory_encoder.Fuser",
        "memory_encoder.MaskDownSampler", "memory_encoder.MemoryEncoder", "position_encoding.PositionEmbeddingSine",
        "sam.transformer.RoPEAttention",
    )
]  # fmt: skip
"""All that the architectures of SAM 2 and 2.1 are made of."""


@contextmanager
def _hydra_state_kept() -> Iterator[None]:
    """Importing sam2 initialises GlobalHydra if nobody has; leave it as it was."""
    from hydra.core.global_hydra import GlobalHydra

    instance = GlobalHydra.instance()
    before = instance.hydra
    try:
        yield
    finally:
        instance.hydra = before


def _build(architecture: str) -> nn.Module:
    """An untrained SAM2Base from a YAML: a path, or one packaged with sam2 such as `configs/sam2.1/sam2.1_hiera_l.yaml`."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    with _hydra_state_kept():
        import sam2

        # `configs/...` is sam2's own and nothing else: a YAML says what is built, so one that lies about is not taken for it.
        packaged = architecture.startswith("configs/")
        path = Path(sam2.__path__[0]) / architecture if packaged else Path(architecture)
        if not path.is_file():
            raise ValueError(f"head.architecture: a SAM 2 YAML is needed; there is no {path}")
        config = OmegaConf.load(path)
        _check_parts(OmegaConf.to_container(config.model, resolve=False), path)
        model = instantiate(
            OmegaConf.merge(config.model, {"sam_mask_decoder_extra_args": _POSTPROCESSING}), _recursive_=True
        )
    assert isinstance(model, nn.Module)
    return model


def _check_parts(node: object, path: Path) -> None:
    """Raise ValueError if an architecture names anything but the parts of SAM 2: a YAML says which code is called."""
    for key, value in strange(node, whole=True):
        raise ValueError(f"head.architecture: {path} must hold plain values; {key} is {value!r:.80}")
    nodes = [node]
    while nodes:
        one = nodes.pop()
        if isinstance(one, dict):
            if one.get("_target_", _PARTS[0]) not in _PARTS:
                raise ValueError(
                    f"head.architecture: {path} must name parts of sam2.modeling; got {one['_target_']!r:.80}"
                )
            nodes += one.values()
        elif isinstance(one, list):
            nodes += one


def _read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, in an official `.pt`, or in a checkpoint of `MaskHeadStage`."""
    from safetensors.torch import load_file

    if not checkpoint.is_file():
        raise ValueError(f"head.checkpoint: weights are needed; there is no file {checkpoint}")
    digests.check(checkpoint, "head.checkpoint")
    if checkpoint.suffix == ".safetensors":
        return load_file(checkpoint)
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "state_dict" in loaded:
        return {k.removeprefix("head.model."): v for k, v in loaded["state_dict"].items()}
    weights: dict[str, Tensor] = loaded["model"]
    return weights


def _within(prompt: MaskPrompt, box: np.ndarray) -> MaskPrompt:
    """The part of a prompt that speaks of one box: the box and the points inside it."""
    x, y = prompt.points[:, 0], prompt.points[:, 1]
    inside = (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])
    return MaskPrompt(boxes=box[None], points=prompt.points[inside], labels=prompt.labels[inside])


def split_by_box(prompt: MaskPrompt) -> list[MaskPrompt]:
    """Return one prompt per box, with its own point or with the points it holds; without boxes, the prompt as it is."""
    if prompt.paired:
        objects = zip(prompt.boxes, prompt.points, prompt.labels, strict=True)
        return [MaskPrompt.of([box], [point], [label]) for box, point, label in objects]
    if len(prompt.boxes):
        return [_within(prompt, box) for box in prompt.boxes]
    return [prompt] if len(prompt.points) else []


class Sam2Head(nn.Module):
    """SAM 2 as a function of images and mask prompts.

    Args:
        architecture: YAML of the network, a path or a name inside the sam2 package.
        checkpoint: weights, safetensors or an official `.pt`; none leaves the network untrained.
        decode_batch: most prompts in one decoder call.
        embeddings_kept: latest images whose embeddings stay in memory.
        embeddings_folder: where embeddings stay for other epochs, runs and ranks; none writes none.
        precision: "float32" or "bfloat16", of the passes of encoder and mask decoder, whatever autocast surrounds them: the
            policy's passes may be in another precision.

    Raises:
        ValueError: if the checkpoint's weights are those of another architecture, or the precision is another.
    """

    def __init__(
        self, architecture: str, checkpoint: str | None, decode_batch: int, embeddings_kept: int,
        embeddings_folder: str | None, precision: Precision = "float32",
    ) -> None:  # fmt: skip
        super().__init__()
        if precision not in _PRECISIONS:
            raise ValueError(f"head.precision: one of {', '.join(_PRECISIONS)} is needed; got {precision}")
        self.precision = _PRECISIONS[precision]
        self.model: Any
        self.model = _build(architecture)
        self.mean: Tensor
        self.std: Tensor
        self.decode_batch = decode_batch
        if checkpoint is not None:
            try:
                self.model.load_state_dict(_read_weights(Path(checkpoint)))
            except (RuntimeError, KeyError) as error:
                first = (str(error).splitlines()[1:] or [repr(error)])[0].strip()
                raise ValueError(
                    f"head.checkpoint: weights of {architecture} are needed; {checkpoint} holds others ({first[:160]})"
                ) from None
        self.size: int = self.model.image_size
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        if embeddings_kept < 0:
            raise ValueError(f"head.embeddings_kept: 0 or more images are needed; got {embeddings_kept}")
        folder = None if embeddings_folder is None else Path(embeddings_folder)
        self.embeddings = Embeddings(embeddings_kept, folder, self._maker)
        self.weights_print: str | None = None
        self.register_load_state_dict_post_hook(lambda *_: self._changed())
        self.ahead: Future[Any] | None = None
        self.worker: ThreadPoolExecutor | None = None
        self.stream: torch.cuda.Stream | None = None
        self.beside = True

    def train(self, mode: bool = True) -> Sam2Head:
        """Stays in evaluation mode, whatever Lightning does to the modules around it."""
        return super().train(False)

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 RGB `[H, W, 3]` each to normalised float `[B, 3, S, S]`."""
        squares = []
        for image in images:
            pixels = sent(torch.tensor(image), self.mean.device).permute(2, 0, 1).float() / 255
            if pixels.shape[1:] != (self.size, self.size):
                pixels = F.interpolate(
                    pixels[None], (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
                )[0]
            squares.append((pixels - self.mean) / self.std)
        return torch.stack(squares)

    def embed(self, pixels: Tensor) -> list[Tensor]:
        """Image features from fine to coarse: strides 4, 8 and 16; the last is the image embedding."""
        with self._passes():
            levels = self.model.forward_image(pixels)["backbone_fpn"]
            features = list(levels[-self.model.num_feature_levels :])
            if self.model.directly_add_no_mem_embed:
                features[-1] = features[-1] + self.model.no_mem_embed.view(1, -1, 1, 1)
        return features

    def _passes(self) -> torch.autocast:
        """Return the context of the head's own precision, which replaces the autocast of whatever surrounds it."""
        kind = self.mean.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def _changed(self) -> None:
        self.embeddings.forget()
        self.weights_print = None

    def _maker(self) -> str:
        """What makes embeddings: weights, input size and precision; only a folder needs to know the weights' own print."""
        if self.embeddings.folder is None:
            return f"{self.precision}@{self.mean.device}"
        if self.weights_print is None:
            self.weights_print = fingerprint(self.model.state_dict(), self.size, _MEAN, _STD)
        return f"{self.weights_print}-{str(self.precision).removeprefix('torch.')}"

    def prepare(self, images: Sequence[np.ndarray]) -> None:
        """Begin to encode images that `segment` will be asked about, beside what the caller does next.

        On a GPU on a stream of its own, on a CPU in a thread where there is more than one core.
        """
        device = self.mean.device
        if len(images) > self.embeddings.kept:  # they would be forgotten before they are asked for
            return
        if device.type == "cuda":
            self._encode_beside(images, device)
        elif device.type == "cpu" and torch.get_num_threads() > 1:
            self.worker = self.worker or ThreadPoolExecutor(1)
            self.ahead = self.worker.submit(self._features, images)

    def _encode_beside(self, images: Sequence[np.ndarray], device: torch.device) -> None:
        """Encode on a stream of its own; where that fails say so once, and leave it to `segment`."""
        if not self.beside:
            return
        main = torch.cuda.current_stream(device)
        try:
            self.stream = self.stream or torch.cuda.Stream(device)
            self.stream.wait_stream(main)
            with torch.cuda.stream(self.stream):
                self._features(images)
        except FAILURES as error:
            self.beside = False
            give_up("the mask head encodes images when it needs them, not beside the sampling", error)
        for embedding in self.embeddings.latest.values():
            for level in embedding:
                level.record_stream(main)

    @torch.no_grad()
    def _features(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Of each image `[B, C, h, w]` from fine to coarse, encoded once while it is remembered."""
        self.embeddings.device = str(self.mean.device)
        return self.embeddings.of(
            images,
            lambda places: self._encoded([images[i] for i in places]),
        )

    def _encoded(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """As many images in a call as have room."""
        size = max(1, _ENCODED // self.size**2)
        calls = [
            self.embed(self.preprocess(images[first : first + size]).to(self.mean.dtype))
            for first in range(0, len(images), size)
        ]
        return calls[0] if len(calls) == 1 else [torch.cat(levels) for levels in zip(*calls, strict=True)]

    def _prepared(self) -> None:
        """Wait for what `prepare` began."""
        if self.stream is not None:
            torch.cuda.current_stream(self.mean.device).wait_stream(self.stream)
        if self.ahead is not None:
            self.ahead.result()
            self.ahead = None

    def decode(self, features: list[Tensor], prompts: Sequence[MaskPrompt]) -> tuple[Tensor, Tensor]:
        """Low-resolution logits of M prompts with one number of points each, each on its own image's features.

        Args:
            features: of `embed`, gathered so that row m belongs to prompt m.
            prompts: M, each with at most one box.

        Returns:
            logits `[M, 1, S/4, S/4]`, predicted IoU `[M, 1]`.
        """
        with self._passes():
            sparse, dense = self._embed_prompts(prompts, features[-1])
            logits, iou, _, _ = self.model.sam_mask_decoder(
                image_embeddings=features[-1],
                image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
                repeat_image=False,
                high_res_features=features[:-1],
            )
        return logits, iou

    def decode_all(self, features: list[Tensor], prompts: Sequence[MaskPrompt]) -> tuple[Tensor, Tensor]:
        """As `decode`, but all four masks, the single one first: `[M, 4, S/4, S/4]` and `[M, 4]`. For training a head."""
        with self._passes():
            sparse, dense = self._embed_prompts(prompts, features[-1])
            logits, iou, _, _ = self.model.sam_mask_decoder.predict_masks(
                image_embeddings=features[-1],
                image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                repeat_image=False,
                high_res_features=features[:-1],
            )
        return logits, iou

    def _embed_prompts(self, prompts: Sequence[MaskPrompt], like: Tensor) -> tuple[Tensor, Tensor]:
        """A box goes in as two corner points (labels 2 and 3) before the others, as SAM2ImagePredictor does it."""
        xy = np.stack([np.concatenate([p.boxes.reshape(-1, 2), p.points]) for p in prompts])
        labels = np.stack([np.concatenate([np.tile([2, 3], len(p.boxes)), p.labels]) for p in prompts])
        coordinates = torch.as_tensor(xy * self.size, dtype=like.dtype, device=like.device)
        kinds = torch.as_tensor(labels, dtype=torch.int32, device=like.device)
        sparse, dense = self.model.sam_prompt_encoder(points=(coordinates, kinds), boxes=None, masks=None)
        return sparse, dense

    @torch.no_grad()
    def segment(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[MaskPrompt | None]]
    ) -> list[list[np.ndarray]]:
        """Masks of each image's prompts: the union over a prompt's boxes.

        Args:
            images: B times uint8 RGB `[H, W, 3]`.
            prompts: for each image any number of prompts; none (a fault) gives an empty mask.

        Returns:
            for each image a bool `[H, W]` per prompt.
        """
        self._prepared()
        features = self._features(images)
        masks = [
            [np.zeros(image.shape[:2], bool) for _ in asked]
            for image, asked in zip(images, prompts, strict=True)
        ]
        calls: dict[tuple[int, int], list[tuple[int, int, MaskPrompt]]] = defaultdict(list)
        for b, asked in enumerate(prompts):
            for g, prompt in enumerate(asked):
                for part in split_by_box(prompt) if prompt is not None else []:
                    # Padding points is not neutral, so a call holds prompts of one shape.
                    calls[len(part.boxes), len(part.points)].append((b, g, part))
        for rows in calls.values():
            for start in range(0, len(rows), self.decode_batch):
                chunk = rows[start : start + self.decode_batch]
                owners = torch.tensor([b for b, _, _ in chunk], device=self.mean.device)
                logits, _ = self.decode([f[owners] for f in features], [part for _, _, part in chunk])
                sizes = [images[b].shape[:2] for b, _, _ in chunk]
                for size in dict.fromkeys(sizes):
                    places = [m for m, other in enumerate(sizes) if other == size]
                    for m, mask in zip(places, _upscaled(logits[places].float(), size), strict=True):
                        masks[chunk[m][0]][chunk[m][1]] |= mask
        return masks


def _upscaled(logits: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Logits `[M, 1, h, w]` to bool masks `[M, H, W]`."""
    full: np.ndarray = (
        F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0].gt(0).cpu().numpy()
    )
    return full
