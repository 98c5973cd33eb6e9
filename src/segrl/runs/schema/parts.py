"""The keys of policies, mask heads, grammars, engines, rewards and data: type and range of each.

A part of a user's own is held against its constructor instead; see `walk`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from segrl.runs.schema.kinds import (
    MOST,
    Count,
    Open,
    Part,
    Pixels,
    Positive,
    Rising,
    Seed,
    Share,
    Text,
    Tokens,
    Weight,
    Words,
    slot,
)  # fmt: skip

Places = Annotated[int, Field(ge=1, le=65_536)]
"""What is done at once: beyond it no device's memory reaches."""
Grammar = Annotated[Any, slot("grammar")]
Samples = Annotated[Any, slot("samples")]


class Nothing(Part):
    """A part without keys."""


class Lora(Part):
    """A low-rank adapter."""

    rank: int = Field(ge=1, le=4096)
    alpha: int = Field(ge=1, le=65_536)
    dropout: float = Field(ge=0, lt=1)


class HFPolicy(Part):
    """`policy`."""

    weights: Text
    image_side: Annotated[int, Field(ge=28, le=8192)] | None  # 28: one token of Qwen2.5-VL's tower
    pixel_budget: Annotated[
        list[Annotated[int, Field(ge=784, le=100_000_000)]],
        Field(min_length=2, max_length=2, description="a list of two whole numbers from 784 to 100000000, the smaller first"), Rising,
    ] | None  # fmt: skip
    temperature: float = Field(ge=0.01, le=10)  # below, logits leave float32's range
    dtype: Literal["float32", "bfloat16", "float16"]
    lora: Annotated[Any, slot("lora")] | None
    train_vision: bool
    gradient_checkpointing: bool


class Sam2Head(Part):
    """`head`."""

    architecture: Text
    checkpoint: Text | None
    decode_batch: Places
    embeddings_kept: int = Field(ge=0, le=MOST)
    embeddings_folder: Text | None
    precision: Literal["float32", "bfloat16"] = "float32"


class Asking(Part):
    """A grammar, which asks."""

    instructions: Text | dict[str, Any] | None = None


class Points(Asking):
    """A grammar of points."""

    max_points: int = Field(ge=1, le=4096)


class Boxes(Asking):
    """A grammar of boxes."""

    max_boxes: int = Field(ge=1, le=4096)


class Tags(Points):
    """Seg-R1's grammar."""

    max_boxes: int = Field(ge=1, le=4096)


class SharedPrefix(Part):
    """`rollout=shared_prefix`."""

    max_tokens: Tokens
    graphs: bool | Literal["auto"] = "auto"
    prefixes_at_once: Places | None = None


class VLLM(Part):
    """`rollout=vllm`."""

    max_tokens: Tokens
    max_prefix: Tokens
    memory: float = Field(gt=0, lt=1)
    sleep: bool
    eager: bool


class VLLMServer(Part):
    """`rollout=vllm_server`."""

    max_tokens: Tokens
    max_prefix: Tokens
    servers: Annotated[Words, Field(min_length=1)]
    timeout: float = Field(gt=0, le=86_400)  # a day


class Term(Part):
    """`reward.terms.NAME`."""

    fn: Annotated[Any, slot("fn")]
    weight: Positive
    needs: Words = []


class RewardMixture(Part):
    """`reward`."""

    terms: Annotated[Any, slot("term", "dict")]


class Threshold(Part):
    """A bound of an IoU."""

    threshold: Share


class Tolerance(Part):
    """A distance in shares of an image's side."""

    tolerance: Share


class Tiered(Part):
    """SAM-R1's tiers."""

    tiers: dict[Share, Weight] = Field(
        min_length=1,
        description="bounds of the IoU from 0 to 1, each with the number from 0 up that passing it pays",
    )


class Quantile(Part):
    """A rank among the latest answers."""

    of: Annotated[Any, slot("fn")]
    window: int = Field(ge=1, le=10_000_000)


class Overlong(Part):
    """DAPO's punishment of length."""

    budget: Tokens
    margin: Annotated[float, Field(gt=0, le=131_072)] | None


class PointCount(Part):
    """A number of points that is wanted."""

    ideal: float = Field(ge=0, le=4096)
    width: Positive


class Matched(Part):
    """VisionReasoner's matching."""

    overlap: Share
    box_tolerance: Share
    point_tolerance: Share


class Module(Part):
    """`data.module`."""

    train: Samples
    val: Annotated[Any, slot("samples", "dict")]
    test: Annotated[Any, slot("samples", "dict")]
    batch_size: int = Field(ge=1, le=1_000_000)
    eval_batch_size: Places
    workers: int = Field(ge=0, le=1024)
    seed: Seed


class Folders(Part):
    """Images and masks."""

    root: Text
    folders: Annotated[Any, slot("folder", "list")]
    side: Pixels | None


class FolderPair(Part):
    """One of `folders`."""

    images: Text
    masks: Text
    keep: str = ""
    only_with_image: bool = False
    mask_suffix: str = ""
    objects: Annotated[list[Annotated[int, Field(ge=0, le=65_535)]], Field(min_length=1)] | None = None
    background: Annotated[list[Annotated[int, Field(ge=0, le=65_535)]], Field(min_length=1)] | None = None
    resize_masks: bool = False


class Listed(Part):
    """A list of samples."""

    path: Text | None
    root: Text | None
    side: Pixels | None


class ReasonSeg(Part):
    """ReasonSeg."""

    root: Text
    split: Text
    every_sentence: bool
    side: Pixels | None


class Referring(Part):
    """The RefCOCO family."""

    annotations: Text
    images: Text
    refs: Text
    split: Text
    count: Count | None
    seed: Seed
    side: Pixels | None
    exclude: Annotated[Any, slot("exclusion", "list")] = []


class Exclusion(Part):
    """One of `exclude`."""

    refs: Text
    splits: Annotated[Words, Field(min_length=1)]


class Scenes(Part):
    """Synthetic scenes."""

    split: Text
    length: Count
    seed: Seed
    size: int = Field(ge=16, le=4096)
    contrast: Annotated[
        list[Share],
        Field(min_length=2, max_length=2, description="a list of two numbers from 0 to 1, the smaller first"), Rising,
    ]  # fmt: skip
    objects: Annotated[
        list[Annotated[int, Field(ge=1, le=8)]],
        Field(min_length=2, max_length=2, description="a list of two whole numbers from 1 to 8, the smaller first"), Rising,
    ]  # fmt: skip


class Traces(Part):
    """Chat traces."""

    path: Text
    grammar: Grammar
    side: Pixels | None


class Annotator(Part):
    """Writes traces of masks."""

    looseness: float = Field(ge=0, lt=1)
    grid: int = Field(ge=1, le=100_000)
    most_parts: int = Field(ge=1, le=1024)


class Data(Open):
    """`data`: what its own YAML refers to, and what is said of the dataset."""

    batch_size: int = Field(ge=1, le=1_000_000)
    global_batch: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    workers: int = Field(ge=0, le=1024)
    published: dict[str, Count | None] = {}
    licence: Text = "not stated"
    module: Annotated[Any, slot("module")]


class TestSet(Open):
    """`testsets.NAME`."""

    root: Text | None
    published: Count | None
    ignored: bool = False
    licence: Text
    source: Text
    # What most `samples` are made of; a user who replaces `samples.folders` leaves it unread.
    annotations: Text | None = None
    images: Text | None = None
    keep: Text | None = None
    masks: Text | None = None
    refs: Text | None = None
    samples: Samples


class Paths(Part):
    """`paths`."""

    runs: Text
    datasets: Text
    weights: Text
    run: Text
