"""The mask head's contract: batched decoding gives what sam2's own predictor gives, one prompt at a time."""

import numpy as np
import pytest
import torch

from segrl.data.synthetic import SyntheticScenes
from segrl.geometry import inner_point, tight_box
from segrl.metrics.functional.overlap import iou
from segrl.models.sam2_head import Sam2Head, split_by_box
from segrl.types import MaskPrompt

SCENES = SyntheticScenes("test", 64, 0, 128, (0.2, 1.0), (1, 1))


@pytest.fixture
def head(nano_head):
    return nano_head


def prompts_of(mask):
    box, point = tight_box(mask), inner_point(mask)
    return [
        MaskPrompt.of([box]),
        MaskPrompt.of([box], [point], [1]),
        MaskPrompt.of([], [point], [1]),
        MaskPrompt.of([box * 0.9], [point, [0.01, 0.01]], [1, 0]),
        MaskPrompt.of([], [point, [0.99, 0.01], [0.01, 0.99]], [1, 0, 0]),
    ]


def by_predictor(head, image, prompt):
    """Run sam2's own inference path, with its hard-coded feature sizes set right."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(head.model)
    size = head.size
    predictor._bb_feat_sizes = [(size // 4, size // 4), (size // 8, size // 8), (size // 16, size // 16)]
    predictor.set_image(image)
    scale = np.array([image.shape[1], image.shape[0]])
    (x,) = [prompt] if len(prompt.boxes) < 2 else [None]
    masks, _, _ = predictor.predict(
        point_coords=x.points * scale if len(x.points) else None,
        point_labels=x.labels if len(x.points) else None,
        box=x.boxes[0] * np.tile(scale, 2) if len(x.boxes) else None,
        multimask_output=False,
    )
    return masks[0] > 0


@pytest.mark.parametrize("size", [(128, 128), (90, 150)])
def test_batched_masks_equal_those_of_the_official_predictor(head, size):
    from PIL import Image

    images, prompts = [], []
    for i in range(3):
        image = np.asarray(Image.fromarray(SCENES[i].image).resize(size[::-1]))
        images.append(image)
        prompts.append(
            [
                p if len(split_by_box(p)[0].points) == len(p.points) else split_by_box(p)[0]
                for p in prompts_of(SCENES[i].mask)
            ]
        )
    for image, asked, masks in zip(images, prompts, head.segment(images, prompts), strict=True):
        for prompt, mask in zip(asked, masks, strict=True):
            assert mask.dtype == bool and mask.shape == image.shape[:2]
            differing = (mask != by_predictor(head, image, prompt)).mean()
            assert differing < 2e-3, differing  # two resizing libraries at the border of a threshold


def test_trained_nano_head_solves_held_out_scenes_from_their_boxes(head):
    scenes = [SCENES[i] for i in range(64)]
    masks = head.segment([s.image for s in scenes], [[MaskPrompt.of([tight_box(s.mask)])] for s in scenes])
    assert np.mean([iou(m, s.mask) for (m,), s in zip(masks, scenes, strict=True)]) >= 0.85


def test_each_image_is_encoded_once_whatever_its_prompts(head, monkeypatch):
    seen = []
    encode = head.model.forward_image
    monkeypatch.setattr(
        head.model, "forward_image", lambda pixels: seen.append(len(pixels)) or encode(pixels)
    )
    head.segment(
        [SCENES[0].image, SCENES[1].image], [prompts_of(SCENES[0].mask) * 4, prompts_of(SCENES[1].mask)]
    )
    assert seen == [2]


def test_no_more_images_are_encoded_at_once_than_have_room(head, monkeypatch):
    images = [SCENES[i].image for i in range(5)]
    prompts = [[MaskPrompt.of([tight_box(SCENES[i].mask)])] for i in range(5)]
    calls, embed = [], Sam2Head.embed
    monkeypatch.setattr(
        Sam2Head, "embed", lambda self, pixels: calls.append(len(pixels)) or embed(self, pixels)
    )
    head.embeddings.forget()
    at_once = head.segment(images, prompts)
    monkeypatch.setattr("segrl.models.sam2_head._ENCODED", 2 * head.size**2 + 1)
    head.embeddings.forget()
    in_calls = head.segment(images, prompts)
    assert calls == [5, 2, 2, 1]
    assert min(iou(a[0], b[0]) for a, b in zip(at_once, in_calls, strict=True)) > 0.99


def test_several_boxes_are_united_and_points_stay_with_their_box(head):
    two = SyntheticScenes("test", 40, 1, 128, (0.8, 1.0), (2, 2))
    from segrl.geometry import components

    scene, parts = next((two[i], c) for i in range(40) if len(c := components(two[i].mask, 0.01, 2)) == 2)
    boxes = [tight_box(part) for part in parts]
    points = [inner_point(part) for part in parts]
    both = MaskPrompt.of(boxes, points, [1, 1])
    single = [MaskPrompt.of([b], [p], [1]) for b, p in zip(boxes, points, strict=True)]
    ((union, first, second),) = head.segment([scene.image], [[both, *single]])
    assert [len(part.points) >= 1 for part in split_by_box(both)] == [True, True]
    if all(len(part.points) == 1 for part in split_by_box(both)):
        assert np.array_equal(union, first | second)
    outside = split_by_box(MaskPrompt.of([[0, 0, 0.2, 0.2]], [[0.9, 0.9], [0.1, 0.1]], [0, 1]))
    assert outside[0].points.tolist() == [pytest.approx([0.1, 0.1])]


def test_a_fault_gives_an_empty_mask(head):
    ((nothing, empty),) = head.segment([SCENES[0].image], [[None, MaskPrompt.of()]])
    assert not nothing.any() and not empty.any()


def test_colours_are_rgb(head):
    """Exchanging red and blue, the released code's defect, must change the masks."""
    scenes = [SCENES[i] for i in range(16)]
    prompts = [[MaskPrompt.of([tight_box(s.mask)])] for s in scenes]
    right = head.segment([s.image for s in scenes], prompts)
    swapped = head.segment([np.ascontiguousarray(s.image[..., ::-1]) for s in scenes], prompts)
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(right, swapped, strict=True))
    mean = head.preprocess([np.full((8, 8, 3), [255, 0, 0], np.uint8)])[0].mean((1, 2))
    assert mean.tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], abs=1e-4)


def test_head_stays_frozen_and_in_evaluation_mode(head):
    head.train()
    assert not head.model.training and not any(p.requires_grad for p in head.parameters())


def test_weights_of_another_architecture_are_refused_by_their_key(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"image_encoder.trunk.pos_embed": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"head\.checkpoint: .*other\.safetensors"):
        Sam2Head("configs/sam2.1/sam2.1_hiera_t.yaml", str(tmp_path / "other.safetensors"), 8, 8, None)


def test_official_format_loads_with_tensors_only(tmp_path, head):
    import torch

    from segrl.runs.configuration import asset

    torch.save({"model": head.model.state_dict()}, tmp_path / "official.pt")
    again = Sam2Head(asset("sam2_nano.yaml"), str(tmp_path / "official.pt"), 8, 8, None)
    assert all(
        torch.equal(a, b)
        for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_importing_sam2_leaves_hydra_as_it_was(head):
    from hydra.core.global_hydra import GlobalHydra

    assert not GlobalHydra.instance().is_initialized()


def test_where_a_stream_of_its_own_fails_masks_are_the_same_and_it_is_said_once(head, monkeypatch):
    def none(device):
        raise RuntimeError("CUDA error: out of streams\nand so on")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", none)
    images, prompts = [SCENES[0].image], [[MaskPrompt.of([tight_box(SCENES[0].mask)])]]
    expected = head.segment(images, prompts)
    monkeypatch.setattr(head, "beside", True)
    head.embeddings.forget()
    with pytest.warns(UserWarning, match="not beside the sampling: CUDA error: out of streams$") as warned:
        for _ in range(2):
            head._encode_beside(images, torch.device("cuda"))
    assert len(warned) == 1 and np.array_equal(head.segment(images, prompts)[0][0], expected[0][0])


def test_a_point_that_is_paired_with_a_box_is_of_that_box_alone():
    boxes, points = [[0, 0, 0.5, 0.5], [0.3, 0.3, 0.8, 0.8]], [[0.4, 0.4], [0.9, 0.6]]
    shared = split_by_box(MaskPrompt.of(boxes, points, [1, 1]))
    assert [part.points.tolist() for part in shared] == [
        np.float32([points[0]]).tolist()
    ] * 2  # and the other of none
    paired = split_by_box(MaskPrompt.of(boxes, points, [1, 1], paired=True))
    for part, box, point in zip(paired, boxes, points, strict=True):
        np.testing.assert_array_equal(part.boxes, np.float32([box]))
        np.testing.assert_array_equal(part.points, np.float32([point]))
        assert part.labels.tolist() == [1]
    assert split_by_box(MaskPrompt.of(paired=True)) == []
