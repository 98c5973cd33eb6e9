"""The frozen mask head SAM 2: each image is encoded once, and prompts are decoded in batches.

This is the only file that imports `sam2`. That package initialises Hydra's global state on import, and its
own builder composes on the application's search path. So it is imported inside functions, Hydra's state is
saved and restored, and `instantiate` builds the model from a packaged YAML.
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

# The options of `build_sam2(apply_postprocessing=True)`: if the single mask is not stable, return the best of
# the three others.
_POSTPROCESSING = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
# Largest number of pixels in one call of the encoder: enough work for a GPU; a million takes 0.4 GB.
_ENCODED = 4 * 1024**2
Precision = Literal["float32", "bfloat16"]
_PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


_PARTS = [
    f"sam2.modeling.{name}" for name in (
        "sam2_base.SAM2Base", "backbones.hieradet.Hiera", "backbones.image_encoder.FpnNeck",
        "backbones.image_encoder.ImageEncoder", "memory_attention.MemoryAttention",
        "memory_attention.MemoryAttentionLayer", "memory_encoder.CXBlock", "memory_encoder.Fuser",
        "memory_encoder.MaskDownSampler", "memory_encoder.MemoryEncoder",
        "position_encoding.PositionEmbeddingSine", "sam.transformer.RoPEAttention",
    )
]  # fmt: skip
"""The classes in the architectures of SAM 2 and 2.1."""


@contextmanager
def _hydra_state_kept() -> Iterator[None]:
    """Restore Hydra's global state afterwards, which importing sam2 initialises."""
    from hydra.core.global_hydra import GlobalHydra

    instance = GlobalHydra.instance()
    before = instance.hydra
    try:
        yield
    finally:
        instance.hydra = before


def _build(architecture: str) -> nn.Module:
    """Build an untrained SAM2Base from a YAML: a path, or `configs/...` inside the sam2 package."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    with _hydra_state_kept():
        import sam2

        # `configs/...` always means sam2's own file, never one in the working directory: a YAML decides which
        # classes are built.
        packaged = architecture.startswith("configs/")
        path = Path(sam2.__path__[0]) / architecture if packaged else Path(architecture)
        if not path.is_file():
            raise ValueError(f"head.architecture: must be a YAML of SAM 2; {path} does not exist")
        config = OmegaConf.load(path)
        _check_parts(OmegaConf.to_container(config.model, resolve=False), path)
        model = instantiate(
            OmegaConf.merge(config.model, {"sam_mask_decoder_extra_args": _POSTPROCESSING}), _recursive_=True
        )
    assert isinstance(model, nn.Module)
    return model


def _check_parts(node: object, path: Path) -> None:
    """Raise ValueError if an architecture names a class outside of `_PARTS` or a value that is not plain."""
    for key, value in strange(node, whole=True):
        raise ValueError(
            f"head.architecture: {path} must hold plain values and references to its own keys; "
            f"{key} is {value!r:.80}"
        )
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
    """Return the state dict of a safetensors file, an official `.pt`, or a checkpoint of `MaskHeadStage`."""
    from safetensors.torch import load_file

    if not checkpoint.is_file():
        raise ValueError(f"head.checkpoint: must be a file of weights; {checkpoint} does not exist")
    digests.check(checkpoint, "head.checkpoint")
    if checkpoint.suffix == ".safetensors":
        return load_file(checkpoint)
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "state_dict" in loaded:
        return {k.removeprefix("head.model."): v for k, v in loaded["state_dict"].items()}
    weights: dict[str, Tensor] = loaded["model"]
    return weights


def _within(prompt: MaskPrompt, box: np.ndarray) -> MaskPrompt:
    """Return the prompt of one box and the points inside it."""
    x, y = prompt.points[:, 0], prompt.points[:, 1]
    inside = (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])
    return MaskPrompt(boxes=box[None], points=prompt.points[inside], labels=prompt.labels[inside])


def split_by_box(prompt: MaskPrompt) -> list[MaskPrompt]:
    """Return one prompt per box, with its paired point or with the points inside it.

    Without boxes, return the prompt as it is, or nothing if it has no points.
    """
    if prompt.paired:
        objects = zip(prompt.boxes, prompt.points, prompt.labels, strict=True)
        return [MaskPrompt.of([box], [point], [label]) for box, point, label in objects]
    if len(prompt.boxes):
        return [_within(prompt, box) for box in prompt.boxes]
    return [prompt] if len(prompt.points) else []


class Sam2Head(nn.Module):
    """SAM 2, which maps images and mask prompts to masks.

    Args:
        architecture: YAML of the network, a path or a name inside the sam2 package.
        checkpoint: weights, safetensors or an official `.pt`. If None, the network is untrained.
        decode_batch: largest number of prompts in one call of the decoder.
        embeddings_kept: number of images whose embeddings stay in memory.
        embeddings_folder: keeps embeddings for other epochs, runs and ranks. If None, none are written.
        precision: "float32" or "bfloat16", of the encoder and the mask decoder, independent of the autocast
            of the policy's passes.

    Raises:
        ValueError: if the architecture or the checkpoint is missing or does not fit, or another argument is
            out of its range.
    """

    def __init__(
        self, architecture: str, checkpoint: str | None, decode_batch: int, embeddings_kept: int,
        embeddings_folder: str | None, precision: Precision = "float32",
    ) -> None:  # fmt: skip
        super().__init__()
        if precision not in _PRECISIONS:
            raise ValueError(f"head.precision: must be one of {', '.join(_PRECISIONS)}; got {precision}")
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
                    f"head.checkpoint: must hold weights of {architecture}; {checkpoint} holds others "
                    f"({first[:160]})"
                ) from None
        self.size: int = self.model.image_size
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        if embeddings_kept < 0:
            raise ValueError(f"head.embeddings_kept: must be 0 or more images; got {embeddings_kept}")
        folder = None if embeddings_folder is None else Path(embeddings_folder)
        self.embeddings = Embeddings(embeddings_kept, folder, self._maker)
        self.weights_print: str | None = None
        self.register_load_state_dict_post_hook(lambda *_: self._changed())
        self.ahead: Future[Any] | None = None
        self.worker: ThreadPoolExecutor | None = None
        self.stream: torch.cuda.Stream | None = None
        self.beside = True

    def train(self, mode: bool = True) -> Sam2Head:
        """Set evaluation mode and return self; `mode`, which Lightning sets on all modules, is ignored."""
        return super().train(False)

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return normalised pixels, float `[B, 3, S, S]`, of images uint8 RGB `[H, W, 3]`."""
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
        """Return image features from fine to coarse (strides 4, 8, 16); the last is the image embedding."""
        with self._passes():
            levels = self.model.forward_image(pixels)["backbone_fpn"]
            features = list(levels[-self.model.num_feature_levels :])
            if self.model.directly_add_no_mem_embed:
                features[-1] = features[-1] + self.model.no_mem_embed.view(1, -1, 1, 1)
        return features

    def _passes(self) -> torch.autocast:
        """Return an autocast context of the head's precision, which overrides the caller's."""
        kind = self.mean.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def _changed(self) -> None:
        """Drop what was made with earlier weights."""
        self.embeddings.forget()
        self.weights_print = None

    def _maker(self) -> str:
        """Return a name for the weights, input size and precision that make embeddings.

        The weights are hashed only if a folder is used; embeddings in memory are dropped when weights change.
        """
        if self.embeddings.folder is None:
            return f"{self.precision}@{self.mean.device}"
        if self.weights_print is None:
            self.weights_print = fingerprint(self.model.state_dict(), self.size, _MEAN, _STD)
        return f"{self.weights_print}-{str(self.precision).removeprefix('torch.')}"

    def prepare(self, images: Sequence[np.ndarray]) -> None:
        """Start to encode images in the background for a later call of `segment`.

        This uses a stream of its own on a GPU, and a thread on a CPU if torch has more than one thread.
        """
        device = self.mean.device
        if len(images) > self.embeddings.kept:  # the cache would drop them before they are used
            return
        if device.type == "cuda":
            self._encode_beside(images, device)
        elif device.type == "cpu" and torch.get_num_threads() > 1:
            self.worker = self.worker or ThreadPoolExecutor(1)
            self.ahead = self.worker.submit(self._features, images)

    def _encode_beside(self, images: Sequence[np.ndarray], device: torch.device) -> None:
        """Encode on a separate stream; if that fails, warn once and let `segment` encode from then on."""
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
        """Return features `[B, C, h, w]` from fine to coarse; images in the cache are not encoded again."""
        self.embeddings.device = str(self.mean.device)
        return self.embeddings.of(
            images,
            lambda places: self._encoded([images[i] for i in places]),
        )

    def _encoded(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Return the features of images, encoded in calls of at most `_ENCODED` pixels or one image."""
        size = max(1, _ENCODED // self.size**2)
        calls = [
            self.embed(self.preprocess(images[first : first + size]).to(self.mean.dtype))
            for first in range(0, len(images), size)
        ]
        return calls[0] if len(calls) == 1 else [torch.cat(levels) for levels in zip(*calls, strict=True)]

    def _prepared(self) -> None:
        """Wait for the work that `prepare` has started."""
        if self.stream is not None:
            torch.cuda.current_stream(self.mean.device).wait_stream(self.stream)
        if self.ahead is not None:
            self.ahead.result()
            self.ahead = None

    def decode(self, features: list[Tensor], prompts: Sequence[MaskPrompt]) -> tuple[Tensor, Tensor]:
        """Decode M prompts to logits of low resolution.

        Args:
            features: from `embed`, gathered so that row m belongs to prompt m.
            prompts: M prompts with the same number of boxes, 0 or 1, and the same number of points.

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
        """Decode as `decode`, but return all four masks, the single one first; training a head uses it."""
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
        """Return the sparse `[M, K, C]` and the dense `[M, C, h, w]` embeddings of M prompts; see `decode`.

        A box becomes two corner points (labels 2 and 3), which precede the points as in SAM2ImagePredictor.
        """
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
        """Return the mask of each prompt: the union of the masks of its boxes.

        Args:
            images: B images, uint8 RGB `[H, W, 3]`.
            prompts: any number per image; None (a fault) gives an empty mask.

        Returns:
            a bool `[H, W]` per prompt, in a list per image.
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
                    # Padding points would change masks, so a call has prompts of one shape only.
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
    """Return bool masks `[M, H, W]` from logits `[M, 1, h, w]`."""
    full: np.ndarray = (
        F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0].gt(0).cpu().numpy()
    )
    return full
