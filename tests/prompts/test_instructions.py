"""The instructions that a policy is given: segrl's, a file's, and those beside its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from segrl.prompts import instructions
from segrl.prompts.answer_json import SamR1Json, SegZeroJson
from segrl.prompts.tags import SegR1Points, SegR1Tags
from segrl.runs.configuration import (
    asset,
    conf_folder,
    instructions_of,
    register_resolvers,
    take_in_instructions,
)

NANO = str(Path(asset("policy_nano")) / instructions.NAME)
# sha256 of the nano policy's chat, as JSON; it depends on every byte.
ASKED = {
    ("seg_r1_tags", None): "e813e9f735bd72b1129632bf29bc4ae5d99b7abfe4d51f433b71a1f2dddc1a92",
    ("seg_r1_tags", "the left fish"): "7ac436f714bf88fc1e9cdbd4e268570eac0be8dc3f118b17c0ebeab5b232bb39",
    ("seg_r1_points", None): "3d06b77a4cbb443ea26e2426f43f64da29741025276c9c04455a3f64e0a8fa93",
}


def said(chat: object) -> list[str]:
    return [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]


@pytest.mark.parametrize(("section", "query"), ASKED)
def test_the_nano_policy_is_asked_as_it_was_trained_to_the_byte(section: str, query: str | None) -> None:
    grammar = {"seg_r1_tags": SegR1Tags(16, 64, NANO), "seg_r1_points": SegR1Points(64, NANO)}[section]
    chat = json.dumps(grammar.messages(query)).encode()
    assert hashlib.sha256(chat).hexdigest() == ASKED[section, query]


def test_the_example_of_segrls_own_texts_leaves_the_number_of_points_open() -> None:
    for text in (*said(SegR1Tags(16, 64).messages(None)), *said(SegR1Points(64).messages(None))):
        assert ",...]</points>" in text and "[1,0,...]</labels>" in text


@pytest.mark.parametrize("query", ["the Left fish", " the Left fish. \n"])
def test_a_query_is_asked_for_without_its_full_stop_in_seg_r1s_words_too(query: str) -> None:
    for grammar in (SegR1Tags(16, 64), SegR1Points(64), SegR1Tags(16, 64, NANO)):
        assert said(grammar.messages(query))[-1] == "Identify and segment the Left fish."


def written(folder: Path, **sections: object) -> str:
    file = folder / "asked.yaml"
    file.write_text(yaml.safe_dump(sections))
    return str(file)


def test_what_is_asked_has_a_digest_that_changes_with_it(tmp_path: Path) -> None:
    own = instructions.digest(SegR1Tags(16, 64))
    assert own == instructions.digest(SegR1Tags(16, 64)) and len(own) == 8
    for key in ("system", "user", "refer"):
        file = written(tmp_path, seg_r1_tags={key: "Say {query}"})
        assert instructions.digest(SegR1Tags(16, 64, file)) != own, key


def test_a_file_takes_the_place_of_the_texts_it_holds_and_of_no_other(tmp_path: Path) -> None:
    file = written(tmp_path, seg_r1_tags={"user": "\nAll of it, {x}.\n", "refer": "Only {query}"})
    grammar = SegR1Tags(16, 64, file)
    assert said(grammar.messages(None)) == [instructions.SEG_R1_SYSTEM, "\nAll of it, {x}.\n"]
    assert said(grammar.messages("a {b}"))[-1] == "Only a {b}"
    file = written(
        tmp_path, sam_r1_json={"system": "Be brief.", "user": "Where is {Question}?"}, seg_r1_points={}
    )
    assert said(SamR1Json(64, file).messages("it")) == ["Be brief.", "Where is it?"]
    assert SegR1Points(64, file).messages(None) == SegR1Points(64).messages(None)
    without = SegR1Tags(16, 64, written(tmp_path, seg_r1_tags={"system": ""}))
    assert [message["role"] for message in without.messages(None)] == ["user"]


BAD = {
    "a section that is not known": ({"seg_r1": {}}, ["seg_r1: must be one of the sections ", "seg_r1_tags"]),
    "a text that is not known": ({"seg_r1_tags": {"usr": "x"}}, ["seg_r1_tags.usr", "system, user, refer"]),
    "a refer where none is": ({"sam_r1_json": {"refer": "x"}, "seg_r1_tags": {}}, ["sam_r1_json.refer"]),
    "a refer without its place": ({"seg_r1_tags": {"refer": "Segment it"}}, ["seg_r1_tags.refer", "{query}"]),
    "a user without its place": ({"seg_zero_json": {"user": "x"}}, ["seg_zero_json.user", "{Question}"]),
    "a number": ({"seg_r1_tags": {"user": 7}}, ["seg_r1_tags.user", "7"]),
    "nothing to say": ({"seg_r1_tags": {"user": " "}}, ["seg_r1_tags.user"]),
    "a look-up": ({"seg_r1_tags": {"user": "${paths.runs}"}}, ["seg_r1_tags.user", "${"]),
    "a list": ([1], ["sections of texts"]),
    "nothing": (None, ["sections of texts"]),
    "a section that is a text": ({"seg_r1_tags": "x"}, ["seg_r1_tags: must hold texts by name"]),
    "nothing of this grammar": (
        {"sam_r1_json": {}},
        ["must have the section seg_r1_tags", "it has sam_r1_json"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_file_is_refused_in_a_line_that_names_it(tmp_path: Path, kind: str) -> None:
    content, needed = BAD[kind]
    file = tmp_path / "asked.yaml"
    file.write_text(yaml.safe_dump(content))
    grammar = SegZeroJson if "seg_zero_json" in str(content) else lambda path: SegR1Tags(16, 64, path)
    with pytest.raises(ValueError) as refusal:
        grammar(str(file))
    assert all(words in str(refusal.value) for words in (str(file), *needed)) and "\n" not in str(
        refusal.value
    )


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"a: \x00"])
def test_what_is_no_yaml_or_not_there_is_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "asked.yaml").write_bytes(content)
    for name in ("asked.yaml", "gone.yaml"):
        with pytest.raises(ValueError, match=name) as refusal:
            SegR1Tags(16, 64, str(tmp_path / name))
        assert "\n" not in str(refusal.value)


def test_what_is_written_beside_weights_is_read_back_by_every_grammar(tmp_path: Path) -> None:
    texts = {"system": "A: ü", "user": "\nB\n", "refer": "C {query}"}
    (tmp_path / instructions.NAME).write_text(
        instructions.written({"seg_r1_tags": texts, "seg_r1_points": {"user": "D"}}), encoding="utf-8"
    )
    assert instructions.read(tmp_path / instructions.NAME)["seg_r1_tags"] == texts
    found = instructions_of(str(tmp_path))
    assert SegR1Tags(16, 64, found).texts == texts
    assert SegR1Points(64, found).texts == SegR1Points(64).texts | {"user": "D"}
    assert SegZeroJson(found).texts == SegZeroJson().texts
    assert instructions_of(str(tmp_path / "elsewhere")) is None


def test_every_grammar_of_the_configuration_asks_with_a_section_of_its_own_name() -> None:
    for file in sorted((conf_folder() / "grammar").glob("*.yaml")):
        node = OmegaConf.load(file)
        node.instructions = NANO  # a run in which the nano policy's texts meet another grammar
        grammar = instantiate(node)
        assert grammar.section == file.stem or (grammar.section, file.stem) == (
            "seg_r1_tags",
            "seg_r1_released",
        )
        assert grammar.texts.keys() == instructions.OWN[grammar.section].keys()


def test_a_file_that_comes_later_changes_no_run(tmp_path: Path) -> None:
    register_resolvers()
    cfg = OmegaConf.create({
        "policy": {"weights": str(tmp_path)},
        "grammar": {"instructions": "${instructions_of:${policy.weights}}"},
    })  # fmt: skip
    take_in_instructions(cfg)
    Path(written(tmp_path, seg_r1_tags={})).rename(tmp_path / instructions.NAME)
    assert "instructions: null" in OmegaConf.to_yaml(cfg) and cfg.grammar.instructions is None
    bare = OmegaConf.create({"grammar": {"_target_": "my.Grammar"}})
    take_in_instructions(bare)
    assert "instructions" not in bare.grammar


def test_a_configuration_takes_the_texts_in() -> None:
    cfg = OmegaConf.create({"grammar": {"instructions": NANO}})
    take_in_instructions(cfg)
    assert SegR1Tags(16, 64, cfg.grammar.instructions).texts == SegR1Tags(16, 64, NANO).texts
    take_in_instructions(cfg)
    assert OmegaConf.to_container(cfg)["grammar"]["instructions"] == instructions.read(Path(NANO))
