"""`python -m segrl.nano.make`: train the nano weights and write them, with cards, into the package.

The mask head and the policy's tower are trained at the same time, with one thread each; then the policy
(cold start). All of it takes less than an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from segrl.tracking.run_folder import RunFolder

HERE = Path(__file__).resolve().parents[1] / "assets"
SEED = 1
_LICENCE = "apache-2.0"  # segrl draws the scenes, and the weights are random at first
WEIGHTS = ("policy_nano/model.safetensors", "policy_nano/tokenizer.json", "sam2_nano.safetensors")


def _train(experiment: str, runs: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start the training of an experiment in the run folder `runs/<experiment>`."""
    command = [
        sys.executable, "-m", "segrl.train", f"+experiment={experiment}", f"seed={SEED}",
        f"paths.runs={runs}", f"paths.run={runs / experiment}", "logger=csv", *overrides,
    ]  # fmt: skip
    print("+", " ".join(command[1:]), flush=True)
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _wait(*trainings: subprocess.Popen[bytes]) -> None:
    """Wait for trainings; exit with 1 at the first that fails."""
    if any(training.wait() for training in trainings):
        sys.exit(1)


def blank(folder: Path) -> Path:
    """Write an untrained nano policy, whose tokenizer is trained on segrl's instructions and traces."""
    import torch

    from segrl.data.annotator import Annotator
    from segrl.data.synthetic import SyntheticScenes
    from segrl.nano import architecture
    from segrl.prompts import instructions
    from segrl.prompts.frames import permille
    from segrl.prompts.tags import SegR1Tags

    annotate, grammar = Annotator(0.25, 32, 3), SegR1Tags(16, 64)
    texts = instructions.read(HERE / "policy_nano" / instructions.NAME)
    scenes = SyntheticScenes("vocabulary", 300, SEED, 128, (0.3, 1.0), (1, 3))
    answers = [
        grammar.render(annotate(scenes[i], np.random.default_rng(i)), permille(128, 128))
        for i in range(len(scenes))
    ]
    asked = [texts["seg_r1_tags"]["system"], texts["seg_r1_tags"]["user"], texts["seg_r1_points"]["user"]]
    torch.manual_seed(SEED)
    written = architecture.write(folder, architecture.qwen3_vl(architecture.vocabulary_texts(asked, answers)))
    shutil.copy(HERE / "policy_nano" / instructions.NAME, written)  # the trainings use these texts
    return written


def box_scores(run: Path) -> dict[str, float]:
    """Return two mean IoUs with the true boxes: of a run's first boxes, and of the best constant box.

    Constant boxes are centred, with sides from 0.2 to 1.
    """
    from segrl.data.synthetic import SyntheticScenes
    from segrl.geometry import tight_box

    lines = [json.loads(line) for line in RunFolder(run).after.read_text().splitlines()]
    from omegaconf import OmegaConf

    data = OmegaConf.load(RunFolder(run).config).data
    scenes = SyntheticScenes(
        "test", data.test_length, data.world, data.side, tuple(data.contrast), tuple(data.objects)
    )
    truth = np.stack([tight_box(scenes[i].mask) for i in range(len(scenes))])
    said = np.stack([np.array(x["boxes"][0]) if "boxes" in x else np.zeros(4) for x in lines])
    sides = np.linspace(0.2, 1.0, 17)
    constant = max(
        float(_box_iou(np.array([[0.5 - w / 2, 0.5 - h / 2, 0.5 + w / 2, 0.5 + h / 2]]), truth).mean())
        for w in sides
        for h in sides
    )
    return {"box_iou": float(_box_iou(said, truth).mean()), "best_constant_box_iou": constant}


def _box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes `[n, 4]`, row by row."""
    overlap = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return overlap / (area - overlap)


def export(runs: Path, out: Path) -> None:
    """Export policy and head from their runs to `out`, each with a card."""
    import torch
    from safetensors.torch import save_file

    from segrl.host import digests
    from segrl.runs.export import card, export_policy
    from segrl.tracking.checkpoints import read_checkpoint

    made = f"Made by `make assets` (seed {SEED}) on scenes drawn by `segrl.data.synthetic`."
    scores = ", ".join(f"{name} {value:.3f}" for name, value in box_scores(runs / "nano_sft").items())
    export_policy(
        RunFolder(runs / "nano_sft").last, out / "policy_nano",
        f"Qwen3-VL's classes at 2.5 million parameters: an early cold start, left for reinforcement "
        f"learning to improve. It imitates annotators who draw loose boxes. {made} "
        f"On 256 held-out scenes: {scores}.",
        "asset:sam2_nano.safetensors", _LICENCE,
    )  # fmt: skip
    weights = read_checkpoint(RunFolder(runs / "nano_head").last, "--runs")["state_dict"]
    head = {k.removeprefix("head.model."): v.to(torch.float16).contiguous() for k, v in weights.items()}
    save_file(head, out / "sam2_nano.safetensors", metadata={"format": "pt"})
    note = (
        f"SAM 2.1 (`sam2_nano.yaml`), stored in half precision. {made} "
        "The score is the mean IoU from true boxes."
    )
    (out / "sam2_nano.md").write_text(card(runs / "nano_head", note, licence=_LICENCE))
    (out / "policy_nano" / digests.NAME).unlink()  # one list for both, without cards, which may be edited
    digests.write(out, WEIGHTS)


def main() -> None:
    """Train all nano weights and export them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/assets"), help="where the trainings keep their run folders"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the weights go")
    parser.add_argument("--steps", type=int, help="of each training, to try the chain out")
    arguments = parser.parse_args()
    from segrl.runs.configuration import register_resolvers

    register_resolvers()
    began, runs = time.monotonic(), arguments.runs
    steps = [f"trainer.max_steps={arguments.steps}"] if arguments.steps else []
    folder = blank(runs / "nano_blank")
    head = _train("nano_head", runs, *steps)
    tower = _train("nano_tower", runs, f"policy.weights={folder}", *steps)
    _wait(tower)
    _wait(head)
    start, trained = (
        RunFolder(runs / "nano_tower").last,
        RunFolder(runs / "nano_head").last,
    )
    _wait(
        _train(
            "nano_sft",
            runs,
            f"policy.weights={folder}",
            f"init_from={start}",
            f"head.checkpoint={trained}",
            *steps,
        )
    )
    export(runs, arguments.out)
    print(f"nano weights in {arguments.out}, made in {(time.monotonic() - began) / 60:.0f} min")


if __name__ == "__main__":
    main()
