"""Define the keys of policies, mask heads, grammars, engines, rewards and data, with types and ranges.

A part from a user's own package has no model here; `walk` compares its keys with its constructor.
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
)

Places = Annotated[int, Field(ge=1, le=65_536)]
"""Number of samples, prefixes or prompts processed at once; the bound is beyond any device's memory."""
Grammar = Annotated[Any, slot("grammar")]
Samples = Annotated[Any, slot("samples")]


class Nothing(Part):
    """A part without keys of its own."""


class Lora(Part):
    """Keys of a low-rank adapter (`policy.lora`, and `lora` of a critic)."""

    rank: int = Field(ge=1, le=4096)
    alpha: int = Field(ge=1, le=65_536)
    dropout: float = Field(ge=0, lt=1)


class HFPolicy(Part):
    """Keys of `policy`."""

    weights: Text
    image_side: Annotated[int, Field(ge=28, le=8192)] | None  # 28 px: one image token of Qwen2.5-VL
    pixel_budget: (
        Annotated[
            list[Annotated[int, Field(ge=784, le=100_000_000)]],
            Field(
                min_length=2,
                max_length=2,
                description="a list of two whole numbers from 784 to 100000000, the smaller first",
            ),
            Rising,
        ]
        | None
    )
    temperature: float = Field(ge=0.01, le=10)  # below 0.01 sampling is practically greedy
    dtype: Literal["float32", "bfloat16", "float16"]
    lora: Annotated[Any, slot("lora")] | None
    train_vision: bool
    gradient_checkpointing: bool


class Sam2Head(Part):
    """Keys of `head`."""

    architecture: Text
    checkpoint: Text | None
    decode_batch: Places
    embeddings_kept: int = Field(ge=0, le=MOST)
    embeddings_folder: Text | None
    precision: Literal["float32", "bfloat16"] = "float32"


class Asking(Part):
    """Keys that all grammars have."""

    instructions: Text | dict[str, Any] | None = None


class Points(Asking):
    """Keys of a grammar with points."""

    max_points: int = Field(ge=1, le=4096)


class Boxes(Asking):
    """Keys of a grammar with boxes."""

    max_boxes: int = Field(ge=1, le=4096)


class Tags(Points):
    """Keys of Seg-R1's grammars with boxes and points."""

    max_boxes: int = Field(ge=1, le=4096)


class SharedPrefix(Part):
    """Keys of `rollout=shared_prefix`."""

    max_tokens: Tokens
    graphs: bool | Literal["auto"] = "auto"
    prefixes_at_once: Places | None = None


class VLLM(Part):
    """Keys of `rollout=vllm`."""

    max_tokens: Tokens
    max_prefix: Tokens
    memory: float = Field(gt=0, lt=1)
    sleep: bool
    eager: bool


class VLLMServer(Part):
    """Keys of `rollout=vllm_server`."""

    max_tokens: Tokens
    max_prefix: Tokens
    servers: Annotated[Words, Field(min_length=1)]
    timeout: float = Field(gt=0, le=86_400)  # seconds; at most one day


class Term(Part):
    """Keys of `reward.terms.NAME`."""

    fn: Annotated[Any, slot("fn")]
    weight: Positive
    needs: Words = []


class RewardMixture(Part):
    """Keys of `reward`."""

    terms: Annotated[Any, slot("term", "dict")]


class Threshold(Part):
    """Keys of a reward with an IoU threshold."""

    threshold: Share


class Tolerance(Part):
    """Keys of a reward with a distance, as a share of the image's side."""

    tolerance: Share


class Tiered(Part):
    """Keys of SAM-R1's tiered reward."""

    tiers: dict[Share, Weight] = Field(
        min_length=1,
        description="bounds of the IoU from 0 to 1, each with the reward, from 0 up, for exceeding it",
    )


class Quantile(Part):
    """Keys of the rank among the latest answers."""

    of: Annotated[Any, slot("fn")]
    window: int = Field(ge=1, le=10_000_000)


class Overlong(Part):
    """Keys of DAPO's soft overlong punishment; lengths in tokens."""

    budget: Tokens
    margin: Annotated[float, Field(gt=0, le=131_072)] | None


class PointCount(Part):
    """Keys of the reward for a number of points."""

    ideal: float = Field(ge=0, le=4096)
    width: Positive


class Matched(Part):
    """Keys of VisionReasoner's matching reward; tolerances as shares of the image's side."""

    overlap: Share
    box_tolerance: Share
    point_tolerance: Share


class Module(Part):
    """Keys of `data.module`."""

    train: Samples
    val: Annotated[Any, slot("samples", "dict")]
    test: Annotated[Any, slot("samples", "dict")]
    batch_size: int = Field(ge=1, le=1_000_000)
    eval_batch_size: Places
    workers: int = Field(ge=0, le=1024)
    seed: Seed


class Folders(Part):
    """Keys of a dataset of image and mask folders."""

    root: Text
    folders: Annotated[Any, slot("folder", "list")]
    side: Pixels | None


class FolderPair(Part):
    """Keys of one entry of `folders`; see `data.image_mask.FolderPair`."""

    images: Text
    masks: Text
    keep: str = ""
    only_with_image: bool = False
    mask_suffix: str = ""
    objects: Annotated[list[Annotated[int, Field(ge=0, le=65_535)]], Field(min_length=1)] | None = None
    background: Annotated[list[Annotated[int, Field(ge=0, le=65_535)]], Field(min_length=1)] | None = None
    resize_masks: bool = False


class Listed(Part):
    """Keys of a dataset listed in a JSON Lines file."""

    path: Text | None
    root: Text | None
    side: Pixels | None


class ReasonSeg(Part):
    """Keys of ReasonSeg."""

    root: Text
    split: Text
    every_sentence: bool
    side: Pixels | None


class Referring(Part):
    """Keys of datasets of the RefCOCO family."""

    annotations: Text
    images: Text
    refs: Text
    split: Text
    count: Count | None
    seed: Seed
    side: Pixels | None
    exclude: Annotated[Any, slot("exclusion", "list")] = []


class Exclusion(Part):
    """Keys of one entry of `exclude`."""

    refs: Text
    splits: Annotated[Words, Field(min_length=1)]


class Scenes(Part):
    """Keys of synthetic scenes."""

    split: Text
    length: Count
    seed: Seed
    size: int = Field(ge=16, le=4096)
    contrast: Annotated[
        list[Share],
        Field(min_length=2, max_length=2, description="a list of two numbers from 0 to 1, the smaller first"),
        Rising,
    ]
    objects: Annotated[
        list[Annotated[int, Field(ge=1, le=8)]],
        Field(
            min_length=2,
            max_length=2,
            description="a list of two whole numbers from 1 to 8, the smaller first",
        ),
        Rising,
    ]


class Traces(Part):
    """Keys of a dataset of chat traces."""

    path: Text
    grammar: Grammar
    side: Pixels | None


class Annotator(Part):
    """Keys of the annotator, which writes traces from masks."""

    looseness: float = Field(ge=0, lt=1)
    grid: int = Field(ge=1, le=100_000)
    most_parts: int = Field(ge=1, le=1024)


class Data(Open):
    """Keys of `data`: facts about the dataset, and keys that its own YAML refers to."""

    batch_size: int = Field(ge=1, le=1_000_000)
    global_batch: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    workers: int = Field(ge=0, le=1024)
    published: dict[str, Count | None] = {}
    licence: Text = "not stated"
    testsets: Annotated[Any, slot("testset", "dict")] = {}  # test sets that `module.test` refers to
    module: Annotated[Any, slot("module")]


class TestSet(Open):
    """Keys of `testsets.NAME` and `data.testsets.NAME`."""

    root: Text | None
    published: Count | None
    ignored: bool = False
    licence: Text
    source: Text
    # `samples` refers to these keys; a user who replaces `samples.folders` may leave them unread.
    annotations: Text | None = None
    images: Text | None = None
    keep: Text | None = None
    masks: Text | None = None
    refs: Text | None = None
    samples: Samples


class Paths(Part):
    """Keys of `paths`."""

    runs: Text
    datasets: Text
    weights: Text
    run: Text
