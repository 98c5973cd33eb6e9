"""The shipped weights are what their cards say: small, parsing, and better than any constant answer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segrl.data.synthetic import SyntheticScenes
from segrl.geometry import tight_box
from segrl.models.hf_vlm import HFPolicy
from segrl.prompts.tags import SegR1Tags
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.runs.configuration import asset, instructions_of

CONSTANTS = np.array(
    [
        [0.5 - w, 0.5 - h, 0.5 + w, 0.5 + h]
        for w in np.linspace(0.1, 0.5, 17)
        for h in np.linspace(0.1, 0.5, 17)
    ]
)


def box_iou(a, b):
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(
        -1
    )
    return overlap / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap)


def test_weights_are_small_and_have_cards():
    folder = Path(asset("."))
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(p.stat().st_size for p in weights) < 16e6
    for card in (folder / "policy_nano" / "README.md", folder / "sam2_nano.md"):
        text = card.read_text()
        assert all(
            word in text
            for word in ("make assets", "seed", "updates", "segrl.data.synthetic", "| metric | value |")
        )


def test_cold_start_parses_and_beats_every_constant_box():
    policy, grammar = (
        HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False),
        SegR1Tags(16, 64, instructions_of(asset("policy_nano"))),
    )
    scenes = SyntheticScenes("test", 192, 0, 128, (0.3, 1.0), (1, 1))
    samples = [scenes[i] for i in range(len(scenes))]
    prefixes = [policy.encoder.encode(grammar.messages(None), s.image) for s in samples]
    texts = sum(
        (SharedPrefixEngine(40).greedy(policy, prefixes[i : i + 64]).texts for i in range(0, 192, 64)), []
    )
    answers = [grammar.parse(t, p.frame) for t, p in zip(texts, prefixes, strict=True)]
    assert np.mean([a.fault is None for a in answers]) >= 0.95
    truth = np.stack([tight_box(s.mask) for s in samples])
    said = np.stack([a.prompt.boxes[0] if a.prompt else np.zeros(4) for a in answers])
    constant = box_iou(CONSTANTS[:, None], truth[None]).mean(1).max()
    assert box_iou(said, truth).mean() >= constant + 0.15
    assert len({t.split("<bbox>")[1] for t in texts if "<bbox>" in t}) > 50  # it does not repeat itself


@pytest.mark.slow
def test_the_whole_chain_can_be_made_anew(tmp_path):
    command = [
        sys.executable,
        "-m",
        "segrl.nano.make",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    made = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {
        "sam2_nano.safetensors",
        "sam2_nano.md",
        "policy_nano/model.safetensors",
        "policy_nano/README.md",
    } <= made
    assert "policy_nano/tokenizer.json" in made and "policy_nano/chat_template.jinja" in made
