"""The one path from image and query to mask: policy, grammar, rollout engine and mask head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segrl.data.boundary import reading
from segrl.data.pictures import in_rgb, loaded, orientation, turned
from segrl.data.transforms import read_image
from segrl.models import policy_card
from segrl.protocols import Grammar, MaskHead, Policy, RolloutEngine
from segrl.types import Answer, Batch, Completions, Sample


@dataclass(kw_only=True)
class Segmenter:
    """A policy with its grammar, engine and mask head; training, evaluation and Python use share it.

    Example: `Segmenter.from_pretrained("my_policy").segment("fish.jpg", "the fish on the left").mask`.
    """

    policy: Policy
    grammar: Grammar
    engine: RolloutEngine
    head: MaskHead
    passes: torch.dtype | None = field(default=None, init=False)
    """Autocast dtype of `segment`; in training and evaluation the trainer sets the precision."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, weights: str | Path = "weights", device: str | torch.device = "cpu"
    ) -> Segmenter:
        """Load a segmenter from a folder that `python -m segrl.export` wrote.

        Args:
            folder: holds the policy, its processor and `segrl.json`.
            weights: folder of the mask heads' checkpoints, such as `sam2.1_hiera_large.pt`.
            device: where policy and mask head run.

        Raises:
            ValueError: if the folder has no `segrl.json`, or it is damaged or names anything but segrl's own
                parts; or if weights are missing or damaged.
        """
        card = policy_card.read(Path(folder))
        if not card:
            raise ValueError(
                f"{folder}: must be a folder that python -m segrl.export wrote; it has no {policy_card.NAME}"
            )
        card["policy"]["weights"] = str(folder)
        policy, grammar, head, engine = (
            policy_card.build(part, card[part], Path(weights))
            for part in ("policy", "grammar", "head", "rollout")
        )
        segmenter = cls(
            policy=policy.eval().to(device), grammar=grammar, engine=engine, head=head.eval().to(device)
        )
        segmenter.passes = policy_card.PRECISIONS[card["precision"]["passes"]]
        return segmenter

    @torch.inference_mode()
    def segment(self, image: np.ndarray | Image.Image | str | Path, query: str | None = None) -> Answer:
        """Return the greedy answer: the mask at the image's own size, thought and mask prompt (`parsed`).

        Args:
            image: uint8 RGB `[H, W, 3]`, a PIL image, or a file.
            query: the object to segment. If None, the instructions alone say what to segment.

        Raises:
            ValueError: if the image cannot be read, the array is not uint8 `[H, W, 3]`, or the processor
                rejects the image or the query.
        """
        if isinstance(image, Image.Image):
            name = getattr(image, "filename", None) or "image"
            picture = loaded(name, image)
            pixels = in_rgb(name, turned(picture, orientation(picture)))
        else:
            pixels = image if isinstance(image, np.ndarray) else read_image(Path(image), upright=True)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"image: must be uint8 [H, W, 3]; got {pixels.dtype} {list(pixels.shape)}")
        pixels = np.ascontiguousarray(pixels)  # e.g. `bgr[..., ::-1]` of OpenCV has a negative stride
        sample = Sample(id="image", image=pixels, mask=np.zeros(pixels.shape[:2], bool), query=query)
        with reading("image", "must be an image that the policy's processor accepts with the query"):
            prefix = self.policy.encoder.encode(self.grammar.messages(query), pixels)
        device = self.policy.device
        with torch.autocast(device.type, dtype=self.passes, enabled=self.passes is not None):
            (answer,) = self(Batch(samples=[sample], prefixes=[prefix]).to(device))
        return answer

    def __call__(self, batch: Batch, seeds: Sequence[int] | None = None) -> list[Answer]:
        """Return one answer per sample: greedy if `seeds` is None, else sampled with one seed per sample."""
        self.head.prepare([sample.image for sample in batch.samples])
        if seeds is None:
            completions = self.engine.greedy(self.policy, batch.prefixes)
        else:
            completions = self.engine.sample(self.policy, batch.prefixes, 1, seeds)
        return self.read(batch, completions, 1)

    def read(self, batch: Batch, completions: Completions, group_size: int) -> list[Answer]:
        """Parse N = B*G completions and decode their masks; each image is encoded once for its group."""
        frames = [prefix.frame for prefix in batch.prefixes for _ in range(group_size)]
        parsed = [self.grammar.parse(t, f) for t, f in zip(completions.texts, frames, strict=True)]
        prompts = [
            [p.prompt for p in parsed[b * group_size : (b + 1) * group_size]] for b in range(len(batch))
        ]
        masks = [m for group in self.head.segment([s.image for s in batch.samples], prompts) for m in group]
        rows = zip(
            completions.texts,
            parsed,
            masks,
            completions.lengths.tolist(),
            completions.finished.tolist(),
            strict=True,
        )
        return [Answer(text=t, parsed=p, mask=m, length=n, finished=f) for t, p, m, n, f in rows]
