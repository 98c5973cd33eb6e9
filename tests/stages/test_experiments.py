"""Every experiment takes two updates at nano scale, through the real command line."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from segrl.data.synthetic import SyntheticScenes
from segrl.geometry import tight_box
from segrl.runs.configuration import conf_folder

EXPERIMENTS = {p.stem for p in (conf_folder() / "experiment").glob("*.yaml")}
SMALL = (
    "trainer.max_steps=2",
    "logger=csv",
    "data.workers=0",
    "data.batch_size=2",
    "trainer.accelerator=cpu",
)
NANO = (
    "policy=nano",
    "policy.image_side=128",
    "head=sam2_nano",
    "rollout.max_tokens=24",
    "callbacks.sheets.every_n_steps=1",
)
EVALUATED = {
    "policy",
    "policy.image_side",
    "head",
    "rollout.max_tokens",
    "data.test_length",
    "logger",
    "data.workers",
    "trainer.accelerator",
}
SYNTHETIC = {
    "demo": (*NANO, "data.test_length=4"),
    "nano_sft": ("policy=nano", "data.test_length=4", "rollout.max_tokens=24"),
    "nano_tower": ("policy=nano",),
    "nano_head": ("data.test_length=4", "trainer.val_check_interval=2"),
}
# As each is downloaded: folder of images, folder of masks, prefix of the names.
LAYOUTS = {
    "grpo_cod10k": [
        ("COD10K-v3/Train/Image", "COD10K-v3/Train/GT_Object", "COD10K-CAM-1-"),
        ("COD10K-v3/Test/Image", "COD10K-v3/Test/GT_Object", "COD10K-CAM-2-"),
        ("CAMO-V.1.0-CVIU2019/Images/Train", "CAMO-V.1.0-CVIU2019/GT", "camourflage_1"),
        ("CAMO-V.1.0-CVIU2019/Images/Test", "CAMO-V.1.0-CVIU2019/GT", "camourflage_2"),
    ],
    "prerl_dis5k": [("DIS-TR/im", "DIS-TR/gt", "1#Accessories#"), ("DIS-VD/im", "DIS-VD/gt", "2#Aircraft#")],
    "sod_duts": [
        ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask", "ILSVRC2012_test_"),
        ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask", "sun_"),
    ],
}

REFER = (
    "sam_r1_refcocog", "ppo_refcocog", "ppo_dense_refcocog", "seg_zero_refcocog", "vision_reasoner_multi",
)  # fmt: skip


def download(root, layout, count=3):
    """Draw a dataset of the published shape."""
    scenes = SyntheticScenes("files", 100, 0, 96, (0.5, 1.0), (1, 1))
    for f, (images, masks, prefix) in enumerate(layout):
        for folder in (root / images, root / masks):
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene = scenes[f * count + i]
            wide = Image.fromarray(scene.image).resize((120, 80))
            wide.save(root / images / f"{prefix}{i}.jpg")
            mask = Image.fromarray(scene.mask.astype(np.uint8) * 255).resize(
                (120, 80), Image.Resampling.NEAREST
            )
            mask.save(root / masks / f"{prefix}{i}.png")
    return root


def refer(root, generalised):
    """Draw a dataset of the refer API's shape; gRefCOCO's sentences name several objects, or none."""
    scenes = SyntheticScenes("files", 10, 0, 96, (0.5, 1.0), (2, 2))
    annotations = root / ("grefcoco" if generalised else "refcocog")
    photos = root / "images/mscoco/images/train2014"
    annotations.mkdir(parents=True)
    photos.mkdir(parents=True)
    refs, objects, pictures = [], [], []
    for i in range(8):
        image, masks = scenes.scene(i)
        name = f"COCO_train2014_{i:012d}.jpg"
        Image.fromarray(image).save(photos / name)
        pictures.append({"id": i, "file_name": name, "height": 96, "width": 96})
        for k, mask in enumerate(masks):
            x1, y1, x2, y2 = (tight_box(mask) * 96).tolist()
            polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
            objects.append({"id": 10 * i + k, "image_id": i, "segmentation": [polygon]})
        named = [[10 * i, 10 * i + 1], [-1], [10 * i]][i % 3] if generalised else 10 * i
        sentences = [{"sent_id": 2 * i + k, "sent": f"the thing {k}"} for k in range(2)]
        split = "train" if i < 6 else "val"
        refs.append({"ref_id": i, "ann_id": named, "image_id": i, "split": split, "sentences": sentences})
    (annotations / "instances.json").write_text(json.dumps({"images": pictures, "annotations": objects}))
    if generalised:
        (annotations / "grefs(unc).json").write_text(json.dumps(refs))
    else:
        (annotations / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))
    return root


def test_every_experiment_is_here():
    twins = {name for name in EXPERIMENTS if name.endswith("_lora")}
    assert set(SYNTHETIC) | set(LAYOUTS) | set(REFER) | {"sft_fcot"} | twins == EXPERIMENTS
    assert {name.removesuffix("_lora") for name in twins} == {*LAYOUTS, "sft_fcot", "sam_r1_refcocog"}


@pytest.mark.parametrize("experiment", [*REFER, "sam_r1_refcocog_lora"])
def test_referring_experiment_trains_on_a_folder_of_its_dataset(cli, tmp_path, experiment):
    root = refer(tmp_path / "data", experiment.startswith("vision_reasoner"))
    code, out, err = cli(
        f"+experiment={experiment}", *NANO, *SMALL, f"data.root={root}", "data.count=4", "stage.group_size=2"
    )
    assert code == 0, err
    (run,) = (tmp_path / "runs" / experiment).iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    (name,) = metrics["test"]
    assert metrics["test"][name]["iou"]["n"] == 4  # every sentence of both objects
    scalars = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    assert "policy/kl" in scalars and metrics["completions"] > 0
    assert ("critic/explained_variance" in scalars) == experiment.startswith("ppo")


@pytest.mark.parametrize("experiment", ["sft_fcot", "sft_fcot_lora"])
def test_a_cold_start_trains_on_traces_made_from_masks(cli, tmp_path, experiment):
    root = download(tmp_path / "data", LAYOUTS["sod_duts"], 4)
    traces = tmp_path / "traces.jsonl"
    arguments = ("data=duts", f"data.root={root}", f"out={traces}", "least_iou=0.05", "head=sam2_nano")
    code, out, err = cli("traces", *arguments, module="prepare")
    assert code == 0, err
    lines = [json.loads(line) for line in traces.read_text().splitlines()]
    assert lines and set(lines[0]) == {"image", "problem", "thinking", "solution"}
    code, out, err = cli(
        f"+experiment={experiment}", *NANO, *SMALL, f"data.root={root}", f"data.traces={traces}",
        "trainer.max_epochs=9"
    )  # fmt: skip
    assert code == 0, err
    (run,) = (tmp_path / "runs" / experiment).iterdir()
    assert "sft/loss" in json.loads((run / "history.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("experiment", sorted(SYNTHETIC))
def test_synthetic_experiment_trains(cli, tmp_path, experiment):
    extra = ("policy.weights=${asset:policy_nano}",) if experiment in ("nano_sft", "nano_tower") else ()
    code, out, err = cli(f"+experiment={experiment}", *SYNTHETIC[experiment], *SMALL, *extra)
    assert code == 0, err
    (run,) = (tmp_path / "runs" / experiment).iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    assert (run / "checkpoints" / "last.ckpt").stat().st_size > 1e6
    assert str(run.name) in out


@pytest.mark.parametrize("experiment", sorted([*LAYOUTS, *(f"{name}_lora" for name in LAYOUTS)]))
def test_paper_experiment_trains_on_a_folder_of_its_dataset(cli, tmp_path, experiment):
    layout = experiment.removesuffix("_lora")
    root = download(tmp_path / "data", LAYOUTS[layout])
    if layout == "grpo_cod10k":  # images without an object lie beside the others, with black masks
        Image.new("RGB", (40, 30)).save(root / "COD10K-v3/Train/Image/COD10K-NonCAM-1.jpg")
        Image.new("L", (40, 30)).save(root / "COD10K-v3/Train/GT_Object/COD10K-NonCAM-1.png")
    code, out, err = cli(
        f"+experiment={experiment}", *NANO, *SMALL, f"data.root={root}", "stage.group_size=2"
    )
    assert code == 0, err
    (run,) = (tmp_path / "runs" / experiment).iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    (name,) = metrics["test"]
    assert metrics["test"][name]["iou"]["n"] == 3
    assert metrics["objective"] == metrics["metrics"][f"test/{name}/sm"]
    assert "policy/kl" in json.loads((run / "history.jsonl").read_text().splitlines()[0])  # beta is 0.04


def test_demo_leaves_everything_that_it_promises(cli, tmp_path):
    code, out, err = cli("+experiment=demo", *SYNTHETIC["demo"], *[s for s in SMALL if s != "logger=csv"])
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "demo").iterdir()
    for name in (
        "metrics.json",
        "reward_curve.png",
        "before_after.png",
        "config.yaml",
        "checkpoints/last.ckpt",
    ):
        assert (run / name).is_file(), name
    sheet = Image.open(run / "before_after.png")
    assert sheet.width > 800 and np.asarray(sheet).std() > 10
    for word in ("IoU", "S-measure", "MAE", "unparsable", "95 % interval", str(run.name), "make mlflow"):
        assert word in out, word
    rows = json.loads((run / "metrics.json").read_text())["test"]["synthetic"]
    assert rows["iou"]["gain"] == pytest.approx(rows["iou"]["after"] - rows["iou"]["before"])
    low, high = rows["iou"]["interval"]
    assert low <= rows["iou"]["gain"] <= high
    logged(tmp_path / "runs", run)


def logged(runs, run):
    """Check that MLflow holds parameters, configuration, git state, scalars, pictures and checkpoint."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    record = client.get_run((run / "mlflow_run_id").read_text())
    assert record.info.status == "FINISHED"
    assert record.data.params["stage/group_size"] == "8"
    assert {"git.commit", "git.dirty", "config.sha256", "version.torch"} <= set(record.data.tags)
    assert {"reward/total", "policy/grad_norm", "rollout/fault_rate", "test/synthetic/iou"} <= set(
        record.data.metrics
    )
    assert len(client.get_metric_history(record.info.run_id, "reward/total")) == 2
    kept = {item.path for item in client.list_artifacts(record.info.run_id)}
    assert {
        "metrics.json",
        "config.yaml",
        "before_after.png",
        "reward_curve.png",
        "sheets",
        "history.jsonl",
    } <= kept
    assert "checkpoints" not in kept and record.data.tags["checkpoints"] == str(run / "checkpoints")


def test_checkpoints_hold_neither_reference_nor_mask_head(cli, tmp_path):
    import torch

    code, _, err = cli(
        "+experiment=demo", *SYNTHETIC["demo"], *SMALL, "reference=frozen_copy", "stage.kl_weight=0.1"
    )
    assert code == 0, err
    (path,) = (tmp_path / "runs").rglob("last.ckpt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert weights and all(name.startswith("policy.") for name in weights)


def test_no_pass_is_spent_on_a_reference_of_weight_zero_nor_on_old_logprobs(cli, monkeypatch):
    from segrl.models.hf_vlm import HFPolicy

    passes = []
    original = HFPolicy.logprobs
    monkeypatch.setattr(
        HFPolicy, "logprobs", lambda self, *a: passes.append(self.training) or original(self, *a)
    )
    code, _, err = cli(
        "+experiment=demo", *SYNTHETIC["demo"], *SMALL, "reference=frozen_copy", "test_before=false"
    )
    assert code == 0, err
    assert len(passes) == 2  # one per update


def test_a_reference_in_half_precision_is_the_policy_that_it_was(cli, tmp_path, monkeypatch):
    """The divergence from it is exactly zero before the policy moves."""
    import torch

    from segrl.models.reference import FrozenCopy

    dtypes, original = [], FrozenCopy.logprobs

    def logprobs(self, *given):
        layer = self.policy.model.model.language_model.layers[0].mlp.down_proj
        dtypes.append((layer.weight.dtype, self.policy.model.lm_head.weight.dtype))
        return original(self, *given)

    monkeypatch.setattr(FrozenCopy, "logprobs", logprobs)
    code, _, err = cli(
        "+experiment=demo", *SYNTHETIC["demo"], *SMALL, "reference=frozen_copy", "stage.kl_weight=0.1",
        "test_before=false", "trainer.precision=bf16-mixed", f"paths.run={tmp_path}/run",
    )  # fmt: skip
    assert code == 0, err
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
    first, second = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert first["policy/kl"] == 0 < second["policy/kl"]


def test_a_later_stage_starts_from_an_earlier_one(cli, tmp_path):
    import torch

    code, _, err = cli("+experiment=demo", *SYNTHETIC["demo"], *SMALL)
    assert code == 0, err
    (first,) = (tmp_path / "runs").rglob("last.ckpt")
    code, _, err = cli(
        "+experiment=demo", *SYNTHETIC["demo"], *SMALL, f"init_from={first}", "name=second",
        "stage.optimizer.lr=1e-30", "reference=frozen_copy", "stage.kl_weight=1.0",
    )  # fmt: skip
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "second").iterdir()
    old, new = (
        torch.load(p, weights_only=True)["state_dict"] for p in (first, run / "checkpoints" / "last.ckpt")
    )
    assert all(torch.equal(old[name], new[name]) for name in old)
    line = json.loads((run / "history.jsonl").read_text().splitlines()[0])
    assert line["policy/kl"] == 0  # the reference started there, too


def test_evaluation_scores_a_checkpoint_without_training(cli, tmp_path):
    code, _, err = cli("+experiment=demo", *SYNTHETIC["demo"], *SMALL)
    assert code == 0, err
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    trained = json.loads((checkpoint.parents[1] / "metrics.json").read_text())["metrics"]
    code, out, err = cli(
        "+experiment=demo",
        "name=score",
        *[word for word in (*SYNTHETIC["demo"], *SMALL) if word.partition("=")[0] in EVALUATED],
        f"init_from={checkpoint}",
        module="evaluate",
    )
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "score").iterdir()
    found = json.loads((run / "metrics.json").read_text())["datasets"]["synthetic"]
    for name in ("sm", "iou", "mae"):
        assert found["scores"][name]["value"] == pytest.approx(trained[f"test/synthetic/{name}"], abs=1e-12)
    assert found["fault_rate"] == trained["test/synthetic/fault_rate"] and " sm " in out


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_what_saves_memory_does_not_change_the_update(cli, tmp_path, stage):
    """One pass that shares the sampler's prefix state is compared with passes per sample, passes per
    completion, and recomputed activations.
    """
    import torch

    ways = {
        "one_pass": ("stage.micro_batch_size=4",),
        "samples": ("stage.micro_batch_size=1",),
        "completions": ("stage.micro_batch_size=2", "stage.completions_per_pass=1"),
        "anew": ("stage.micro_batch_size=4", "policy.gradient_checkpointing=true"),
    }
    of_stage = {
        "grpo": (),
        "ppo": ("stage=ppo", "stage.critic_warmup=0", "reference=frozen_copy", "stage.updates_per_rollout=1"),
    }[stage]
    states = {}
    for name, way in ways.items():
        code, _, err = cli(
            "+experiment=demo", f"name={name}", *of_stage, *SYNTHETIC["demo"], *SMALL, "data.batch_size=4",
            "test_before=false", *way, "stage.optimizer._target_=torch.optim.SGD", "~stage.optimizer.betas",
            "~stage.optimizer.eps", "trainer.max_steps=2", "stage.schedule=null", "stage.optimizer.lr=0.01",
        )  # fmt: skip
        assert code == 0, err
        (path,) = (tmp_path / "runs" / name).rglob("last.ckpt")
        states[name] = torch.load(path, weights_only=True)["state_dict"]
    from segrl.models.hf_vlm import HFPolicy
    from segrl.runs.configuration import asset

    start = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False).state_dict()
    one = states["one_pass"]
    moved = max(
        (value - start[n.removeprefix("policy.")]).abs().max()
        for n, value in one.items()
        if n[:7] == "policy."
    )
    assert moved > 1e-4
    for name, state in states.items():
        assert max((value - state[place]).abs().max() for place, value in one.items()) < 1e-6, name
