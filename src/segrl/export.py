"""`python -m segrl.export RUN_FOLDER OUT`: a trained policy as a Hugging Face folder with a model card."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from segrl.front_door import explain, register_resolvers, scored_checkpoint


def export_policy(run: Path, out: Path, note: str) -> None:
    """Write the policy of a run's last checkpoint as weights, processor and card.

    Args:
        run: folder with config.yaml, metrics.json and checkpoints/last.ckpt.
        out: folder to write.
        note: first paragraph of the card.

    Raises:
        ValueError: if `run` is no finished run, or its checkpoint holds no policy.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from segrl.tracking.checkpoints import read_checkpoint

    if not (run / "config.yaml").is_file() or not (run / "metrics.json").is_file():
        raise ValueError(
            f"export: the folder of a finished run is needed; {run} has no config.yaml and metrics.json"
        )
    cfg = OmegaConf.load(run / "config.yaml")
    weights = read_checkpoint(scored_checkpoint(run))["state_dict"]
    learned = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    if not learned:
        raise ValueError(f"export: a run that trained a policy is needed; the checkpoint of {run} holds none")
    policy = instantiate(cfg.policy)
    policy.take_over(learned)
    policy.save(out)
    (out / "README.md").write_text(card(run, note))


def card(run: Path, note: str) -> str:
    """Markdown: what it is, the command's configuration, the scores of the run."""
    from omegaconf import OmegaConf

    metrics = json.loads((run / "metrics.json").read_text())
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics["metrics"].items())
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))  # unresolved: no path of one machine
    assert isinstance(config, dict)
    settings = OmegaConf.to_yaml(
        OmegaConf.create({k: config[k] for k in ("stage", "rollout", "reward", "data", "trainer")})
    )
    return (
        f"---\nlicense: apache-2.0\n---\n# {metrics['name']}\n\n{note}\n\n"
        f"Trained by segrl, experiment `{metrics['name']}`, seed {metrics['seed']}, {metrics['steps']} updates, "
        f"{metrics['seconds']:.0f} s.\n\n| metric | value |\n|---|---|\n{scores}\n\n"
        f"<details><summary>configuration</summary>\n\n```yaml\n{settings}```\n</details>\n"
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    from hydra.errors import HydraException

    register_resolvers()
    try:
        export_policy(
            arguments.run, arguments.out, "A policy that writes mask prompts for a promptable segmenter."
        )
    except (ValueError, HydraException) as error:
        line = explain(error, "train", []) or str(error)
        print(f"segrl: {line}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
