"""The one inference path: policy, grammar and mask head joined; image and query to mask."""

from __future__ import annotations

from collections.abc import Sequence
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


class Segmenter:
    """Samples and their completions to answers, the same in training, evaluation and use.

    Example: `Segmenter.from_pretrained("my_policy").segment("fish.jpg", "the fish on the left").mask`.

    Args:
        policy, grammar, engine, head: the same objects that train.
    """

    def __init__(self, policy: Policy, grammar: Grammar, engine: RolloutEngine, head: MaskHead) -> None:
        self.policy, self.grammar, self.engine, self.head = policy, grammar, engine, head
        self.passes: torch.dtype | None = None  # of `segment`; elsewhere the trainer casts

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, weights: str | Path = "weights", device: str | torch.device = "cpu"
    ) -> Segmenter:
        """A segmenter from a folder that `python -m segrl.export` wrote.

        Args:
            folder: policy, processor and `segrl.json`.
            weights: folder of the mask heads' checkpoints, such as `sam2.1_hiera_large.pt`.
            device: of policy and mask head.

        Raises:
            ValueError: if the folder has no `segrl.json`, or it is damaged or names anything but segrl's own parts.
        """
        card = policy_card.read(Path(folder))
        if not card:
            raise ValueError(
                f"{folder}: a folder that python -m segrl.export wrote is needed; it has no {policy_card.NAME}"
            )
        card["policy"]["weights"] = str(folder)
        policy, grammar, head, engine = (
            policy_card.build(part, card[part], Path(weights))
            for part in ("policy", "grammar", "head", "rollout")
        )
        segmenter = cls(policy.eval().to(device), grammar, engine, head.eval().to(device))
        segmenter.passes = policy_card.PASSES[card["precision"]["passes"]]
        return segmenter

    @torch.inference_mode()
    def segment(self, image: np.ndarray | Image.Image | str | Path, query: str | None = None) -> Answer:
        """One answer: its mask at the image's own size, and what was thought and prompted (`parsed`).

        Args:
            image: uint8 RGB `[H, W, 3]`, a PIL image, or a file.
            query: what to segment; none where the grammar asks for whatever stands out.

        Raises:
            ValueError: if the file or the PIL image is none that can be read, or the array is of another kind.
        """
        if isinstance(image, Image.Image):
            name = getattr(image, "filename", None) or "image"
            picture = loaded(name, image)
            pixels = in_rgb(name, turned(picture, orientation(picture)))
        else:
            pixels = image if isinstance(image, np.ndarray) else read_image(Path(image), upright=True)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"image: uint8 [H, W, 3] is needed; got {pixels.dtype} {list(pixels.shape)}")
        pixels = np.ascontiguousarray(pixels)  # OpenCV's channels turned around, for one
        sample = Sample(id="image", image=pixels, mask=np.zeros(pixels.shape[:2], bool), query=query)
        with reading("image", "an image and a query that the policy's processor takes are needed"):
            prefix = self.policy.encoder.encode(self.grammar.messages(query), pixels)
        device = self.policy.device
        with torch.autocast(device.type, dtype=self.passes, enabled=self.passes is not None):
            (answer,) = self(Batch(samples=[sample], prefixes=[prefix]).to(device))
        return answer

    def __call__(self, batch: Batch, seeds: Sequence[int] | None = None) -> list[Answer]:
        """One answer per sample: the greedy one, or one drawn by each sample's seed."""
        self.head.prepare([sample.image for sample in batch.samples])
        if seeds is None:
            completions = self.engine.greedy(self.policy, batch.prefixes)
        else:
            completions = self.engine.sample(self.policy, batch.prefixes, 1, seeds)
        return self.read(batch, completions, 1)

    def read(self, batch: Batch, completions: Completions, group_size: int) -> list[Answer]:
        """Parse and draw N = B*G completions; each image is encoded once for its group."""
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
