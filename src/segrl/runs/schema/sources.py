"""Find missing weights and datasets, and name the command or the place to get them."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def lacks(path: Path) -> str:
    """Return why a file or folder cannot be used, missing or empty; "" if it can."""
    if not path.exists():
        return f"{path} does not exist"
    if path.is_dir():
        return "" if any(path.iterdir()) else f"the folder {path} is empty"
    return "" if path.stat().st_size else f"the file {path} is empty"


def way_to(path: Path, owners: str) -> str:
    """Return the command that fetches a file or folder, or the place where its owners publish it.

    Args:
        path: where to save it.
        owners: a URL, or several in running text.
    """
    if match := re.fullmatch(r"https://huggingface\.co/(datasets/)?([\w.-]+/[\w.-]+)", owners):
        kind = " --repo-type dataset" if match[1] else ""
        return f"fetch it with: hf download {match[2]}{kind} --local-dir {path}; {owners}"
    if re.fullmatch(r"https?://\S+", owners) and owners.rpartition("/")[2] == path.name:
        return f"fetch it with: curl -L --create-dirs -o {path} {owners}"
    return f"its owners publish it at {owners}"


def absent(key: str, path: str, owners: str) -> str:
    """Return the error line for a key whose file or folder does not exist, with the way to get it."""
    return f"{key}: must be a file or folder; {path} does not exist ({way_to(Path(path), owners)})"


def missing(cfg: DictConfig, files: bool) -> list[str]:
    """Return an error line for each needed file or folder that is missing or empty, with the way to get it.

    Args:
        cfg: composed.
        files: whether the dataset's files are needed.
    """
    lines, looked = [], set()
    unread = not files or bool(cfg.get("testsets"))  # test sets have their own roots, so `data.*` is not read
    for key, owners in cfg.get("sources", {}).items():
        path = OmegaConf.select(cfg, key)
        looked.add(key)
        if path is not None and not (key.startswith("data.") and unread) and (what := lacks(Path(path))):
            instead = (
                "; or use head=sam2_nano, which ships with segrl and segments drawn scenes only"
                if key == "head.checkpoint"
                else ""
            )
            lines.append(
                f"{key}: must be a file or folder with content; {what}; {way_to(Path(path), owners)}{instead}"
            )
    root = None if unread else OmegaConf.select(cfg, "data.root")
    if root is not None and "data.root" not in looked and not Path(root).is_dir():
        lines.append(
            f"data.root: must be a folder; {root} {'is a file' if Path(root).exists() else 'does not exist'}"
        )
    for key in ("ckpt_path", "init_from"):
        if (path := cfg.get(key)) is not None and not Path(path).is_file():
            lines.append(f"{key}: must be a checkpoint; there is no file {path}")
    return lines
