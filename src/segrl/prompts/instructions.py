"""Instruction texts of the grammars, and the YAML files that replace them.

SFT, RL and evaluation use the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # runs.configuration imports this module, and must import nothing heavy
    from segrl.protocols import Grammar, Message

NAME = "instructions.yaml"
"""Name of the file beside a policy's weights that holds the instructions it was trained with."""

# After the system and user message of Seg-R1's grpo.py (RL stage), reworded (see docs/seg_r1.md).
SEG_R1_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process should be enclosed within <think> </think>, and the bounding box, points "
    "and points labels within <bbox> </bbox>, <points> </points> and <labels> </labels>, i.e., <think> "
    "reasoning process here </think> <bbox>[x1,y1,x2,y2]</bbox>, <points>[[x3,y3],[x4,y4],...]</points>, "
    "<labels>[1,0,...]</labels>. Where 1 indicates a foreground point and 0 a background point. Only "
    "generate a moderate number of points."
)
SEG_R1_USER = (
    "Identify and segment all the primary objects in the image. Output the result using the exact format: "
    "<think> reasoning process here </think> <bbox>[x1,y1,x2,y2]</bbox>, "
    "<points>[[x3,y3],[x4,y4],...]</points>, <labels>[1,0,...]</labels>."
)
# After Seg-R1's referring evaluation, whose text has no full stop behind the expression.
SEG_R1_REFER = "Identify and segment {query}."

# After Seg-R1's grpo_prerl.py, reworded; neither has a system message.
SEG_R1_POINTS_USER = (
    "Generate a sparse set of point prompts to help segment the most salient object in the image. Include "
    "both foreground and background points, and only a moderate number of them. Output the result using the "
    "exact format: <points>[[x1,y1],[x2,y2],...]</points> <labels>[1,0,...]</labels>, where 1 indicates a "
    "foreground point and 0 a background point."
)

# Query of the grammars below for a sample without one.
NO_QUERY = "the primary object"

# SAM-R1 (arXiv 2505.22596), figure 1, with its punctuation. The figure does not print the example answer:
# this one has the form of the figure's outputs and neutral numbers.
SAM_R1_USER = (
    'Please find the bounding box (bbox) and points containing "{Question}". Compare the differences '
    "between objects, locate, and identify the most closely matched target object. Output the thinking "
    "process within <think> </think> tags, and the final answer within <answer> </answer> tags. Output the "
    "bounding box that exactly contains the target object, and output some points to help better locate the "
    "object within the bounding box. For the points within the bounding box:Points of the target object are "
    "marked with 1. Points within the bounding box but not part of the target object are marked with 0. The "
    "points are represented as [x1, y1, value],Please output in JSON format, for example, <think> here is "
    "the thinking process </think> To generate the mask of the target object, "
    '<answer>{"bbox":[10,100,200,210],"points":[[30,110,1],[35,180,1]]}</answer>'
)

# Seg-Zero at commit 77f9ea5; spaces are missing there, too.
SEG_ZERO_USER = (
    "Please find '{Question}' with bbox and points.Compare the difference between objects and find the most "
    "closely matched one.Output the thinking process in <think> </think> and final answer in <answer> "
    "</answer> tags.Output the one bbox and points of two largest inscribed circles inside the interested "
    "object in JSON format.i.e., <think> thinking process here </think><answer>{'bbox': [10,100,200,210], "
    "'points_1': [30,110], 'points_2': [35,180]}</answer>"
)

# VisionReasoner.
VISION_REASONER_USER = (
    'Please find "{Question}" with bboxs and points.Compare the difference between object(s) and find the '
    "most closely matched object(s).Output the thinking process in <think> </think> and final answer in "
    "<answer> </answer> tags.Output the bbox(es) and point(s) inside the interested object(s) in JSON "
    'format.i.e., <think> thinking process here </think><answer>[{"bbox_2d": [10,100,200,210], "point_2d": '
    '[30,110]}, {"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]</answer>'
)

OWN: dict[str, dict[str, str]] = {
    "seg_r1_tags": {"system": SEG_R1_SYSTEM, "user": SEG_R1_USER, "refer": SEG_R1_REFER},
    "seg_r1_points": {"system": "", "user": SEG_R1_POINTS_USER, "refer": SEG_R1_REFER},
    "sam_r1_json": {"system": "", "user": SAM_R1_USER},
    "seg_zero_json": {"system": "", "user": SEG_ZERO_USER},
    "vision_reasoner_json": {"system": "", "user": VISION_REASONER_USER},
}
"""segrl's own texts by section. If there is a `refer`, it asks for a query, and `user` asks without one."""

Sections = Mapping[str, Mapping[str, str] | None]
"""Texts by section that replace segrl's own; an empty section keeps them."""


def _placeholder(section: str, key: str) -> str:
    """Return the placeholder of the query that a text must contain, or an empty string."""
    if key == "refer":
        return "{query}"
    return "{Question}" if key == "user" and "refer" not in OWN[section] else ""


def checked(sections: object, source: str) -> dict[str, dict[str, str]]:
    """Return the sections of a file as plain texts.

    Raises:
        ValueError: naming `source`, section and key, if there is no section, a section or text is unknown, or
            a text is no string, blank (only `system` may be), lacks its placeholder, or contains `${`.
    """
    if not isinstance(sections, Mapping) or not sections:
        raise ValueError(f"{source}: must hold sections of texts, of {', '.join(OWN)}; got {sections!r:.80}")
    texts: dict[str, dict[str, str]] = {}
    for section, given in sections.items():
        if section not in OWN:
            raise ValueError(f"{source}: {section}: must be one of the sections {', '.join(OWN)}")
        if not isinstance(given, Mapping | None):
            raise ValueError(f"{source}: {section}: must hold texts by name; got {given!r:.80}")
        for key, text in (given or {}).items():
            where = f"{source}: {section}.{key}"
            if key not in OWN[section]:
                raise ValueError(f"{where}: must be one of the texts {', '.join(OWN[section])}")
            if not isinstance(text, str) or (not text.strip() and key != "system"):
                raise ValueError(f"{where}: must be a text; got {text!r:.80}")
            if (placeholder := _placeholder(section, key)) not in text:
                raise ValueError(
                    f"{where}: must hold {placeholder}, which the query replaces; got {text!r:.80}"
                )
            if "${" in text:
                raise ValueError(f"{where}: must not hold ${{, which a configuration would replace")
        texts[section] = dict(given or {})
    return texts


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return the sections of a YAML file; raise ValueError if it is missing, no YAML, or not valid."""
    import yaml

    if not path.is_file():
        raise ValueError(f"grammar.instructions: must be a YAML file of texts; there is no file {path}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: must be YAML; {' '.join(str(error).split())}") from None
    return checked(loaded, str(path))


def told(given: str | Sections | None, section: str) -> dict[str, str]:
    """Return the texts of one section: the given ones, and segrl's own for those that are not given.

    Args:
        given: a YAML file, its sections, or None for segrl's own texts.
        section: a key of `OWN`.

    Raises:
        ValueError: if the file is missing or damaged, or lacks the section.
    """
    if given is None:
        return dict(OWN[section])
    source = given if isinstance(given, str) else "grammar.instructions"
    sections = read(Path(given)) if isinstance(given, str) else checked(given, source)
    if section not in sections:
        raise ValueError(
            f"{source}: must have the section {section}, whose texts this grammar asks with; "
            f"it has {', '.join(sections)} ({section}: {{}} keeps segrl's own texts)"
        )
    return OWN[section] | sections[section]


def written(sections: Sections) -> str:
    """Return the YAML of these sections; all others are empty, which keeps segrl's own texts."""
    import yaml

    said = {name: dict(sections.get(name) or {}) for name in OWN}
    return str(yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=110))


def digest(grammar: Grammar) -> str:
    """Return the first 8 hexadecimal digits of a SHA-256 that identifies a grammar's instructions.

    It is taken over the grammar's chat without a query and its chat with one.
    """
    asked = json.dumps([grammar.messages(None), grammar.messages("{query}")], default=str)
    return hashlib.sha256(asked.encode()).hexdigest()[:8]


def chat(texts: Mapping[str, str], query: str | None) -> list[Message]:
    """Return the chat of a section's texts: a system message if there is one, then image before text.

    White space around the query and full stops at its end are removed: the text may have its own.
    """
    what = (query or "").strip().rstrip(".").strip()
    if "refer" in texts:
        said = texts["refer"].replace("{query}", what) if what else texts["user"]
    else:
        said = texts["user"].replace("{Question}", what or NO_QUERY)
    system = (
        [{"role": "system", "content": [{"type": "text", "text": texts["system"]}]}]
        if texts["system"]
        else []
    )
    return [*system, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said}]}]
