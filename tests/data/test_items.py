"""The contract of every loader of files: one listing, for check and training, which opens no image."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from layouts import coco, folders, photograph, polygon, reason, ref, truth
from PIL import Image

import segrl.data
from segrl.data import chat_traces
from segrl.data.chat_traces import ChatTraces
from segrl.data.image_mask import ImageMaskFolders
from segrl.data.jsonl import JsonlDataset
from segrl.data.reasoning import ReasonSeg
from segrl.data.referring import ReferringExpressions
from segrl.data.survey import ItemDataset, Survey
from segrl.prompts.tags import SegR1Tags

SOLUTION = "<bbox>[1,1,9,9]</bbox> <points>[[4,4]]</points> <labels>[1]</labels>"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A download in a loader's layout, and how to damage it so that the listing shows it."""

    loader: type[ItemDataset]
    arguments: dict[str, object]
    ids: list[str]
    damage: dict[str, Callable[[], object]]

    def survey(self) -> Survey:
        return self.loader.survey(**self.arguments)

    def dataset(self) -> ItemDataset:
        return self.loader(**self.arguments)


def image_mask(home: Path) -> Case:
    folders(home, "b/i", "b/m", ("y", "x"))
    folders(home, "a/i", "a/m", ("x",))
    pairs = [{"images": f"{name}/i", "masks": f"{name}/m"} for name in "ba"]
    return Case(
        loader=ImageMaskFolders, arguments={"root": str(home), "folders": pairs, "side": None},
        ids=["b/i/x", "b/i/y", "a/i/x"],
        damage={
            "no mask": (home / "a/m/x.PNG").unlink, "no image": (home / "a/i/x.JPG").unlink,
            "one name twice": lambda: photograph(home / "b/i/x.png"),
            "no folder": lambda: (home / "a/m").rename(home / "a/masks"),
        },
    )  # fmt: skip


def jsonl(home: Path) -> Case:
    photograph(home / "a.png"), photograph(home / "b.png"), truth(home / "m.png")
    listed = home / "l.jsonl"
    lines = [{"image": f"{stem}.png", "mask": "m.png"} for stem in "bab"]
    listed.write_text("\n".join(map(json.dumps, lines)))
    return Case(
        loader=JsonlDataset, arguments={"path": str(listed), "root": None, "side": None},
        ids=["b-0", "a", "b-2"],
        damage={
            "no mask": (home / "m.png").unlink, "no image": (home / "a.png").unlink, "no file": listed.unlink,
            "one id twice": lambda: listed.write_text("\n".join([json.dumps({**lines[0], "id": "x"})] * 2)),
            "no JSON": lambda: listed.write_text("{"), "empty": lambda: listed.write_text("\n"),
        },
    )  # fmt: skip


def reasoning(home: Path, every_sentence: bool) -> Case:
    for stem in ("b", "a"):
        reason(home / "val", stem, ["what?", "which?"], [polygon("target", (1, 1), (9, 1), (9, 9))])
    arguments = {"root": str(home), "split": "val", "every_sentence": every_sentence, "side": None}
    return Case(
        loader=ReasonSeg, arguments=arguments,
        ids=["a-0", "a-1", "b-0", "b-1"] if every_sentence else ["a", "b"],
        damage={
            "no JSON": lambda: (home / "val/b.json").write_text("{"), "no text": (home / "val/b.json").unlink,
            "no image": (home / "val/a.jpg").unlink, "no folder": lambda: (home / "val").rename(home / "x"),
            "empty": lambda: [path.unlink() for path in (home / "val").iterdir()],
        },
    )  # fmt: skip


def referring(home: Path) -> Case:
    refs = [
        ref(2, "val", 21, ("top", "left"), image=2),
        ref(1, "val", 11, ("x",)),
        ref(3, "train", 99, ("y",)),
    ]
    coco(home, "images", "r", "refs.json", refs)
    return Case(
        loader=ReferringExpressions,
        arguments={
            "annotations": str(home / "r"), "images": str(home / "images"), "refs": "refs.json",
            "split": "val", "count": None, "seed": 0, "side": None,
        },
        ids=["2-20", "2-21", "1-10"],
        damage={
            "no image": (home / "images" / "COCO_train2014_000000000001.jpg").unlink,
            "no refs": (home / "r/refs.json").unlink, "no instances": (home / "r/instances.json").unlink,
            "no object": lambda: coco(home, "images", "r", "refs.json", [*refs, ref(4, "val", 99, ("z",))]),
            "empty": lambda: coco(home, "images", "r", "refs.json", refs[2:]),
        },
    )  # fmt: skip


def draws(home: Path) -> Case:
    whole = referring(home)
    few = lambda: coco(home, "images", "r", "refs.json", [ref(1, "val", 11, ("x",))])  # noqa: E731
    drawn = ReferringExpressions(**{**whole.arguments, "count": 2, "seed": 3}).ids
    assert len(drawn) == 2 and set(drawn) < set(whole.ids)
    arguments = {**whole.arguments, "count": 2, "seed": 3}
    return Case(loader=ReferringExpressions, arguments=arguments, ids=drawn, damage={"too few": few})


def traces(home: Path) -> Case:
    photograph(home / "b.png"), photograph(home / "a.png")
    path = home / "t.jsonl"
    line = {"thinking": "It is there.", "solution": SOLUTION}
    path.write_text("\n".join(json.dumps({**line, "image": f"{stem}.png"}) for stem in "bab"))
    return Case(
        loader=ChatTraces, arguments={"path": str(path), "grammar": SegR1Tags(16, 64), "side": None},
        ids=["b-0", "a-1", "b-2"],
        damage={
            "no image": (home / "a.png").unlink, "no file": path.unlink, "empty": lambda: path.write_text(""),
            "no solution": lambda: path.write_text('{"image": "a.png", "thinking": ""}'),
        },
    )  # fmt: skip


def shards(home: Path) -> Case:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = photograph(home / "a.png").read_bytes()
    columns = {
        "image": [{"bytes": content, "path": "x"}] * 2,
        "thinking": ["t"] * 2,
        "solution": [SOLUTION] * 2,
    }
    path = home / "data" / "train-0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({**columns, "problem": ["p"] * 2}), path)
    arguments = {"path": str(path.parent), "grammar": SegR1Tags(16, 64), "side": None}
    return Case(
        loader=ChatTraces, arguments=arguments, ids=["train-0-00000-0", "train-0-00001-1"],
        damage={
            "no file": path.unlink, "no shard": lambda: path.write_bytes(b"x"),
            "no columns": lambda: pq.write_table(pa.table({"image": columns["image"]}), path),
        },
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[Path], Case]] = {
    "image_mask": image_mask, "jsonl": jsonl, "reasoning": lambda home: reasoning(home, False),
    "every_sentence": lambda home: reasoning(home, True), "referring": referring, "draws": draws,
    "traces": traces, "shards": shards,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_survey_opens_no_image(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = LAYOUTS[layout](tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix.lower() in (".jpg", ".png") and not path.name.startswith("."):
            path.write_bytes(b"no image")

    def opened(*given: object, **options: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(chat_traces, "_images", opened)
    found = case.survey()
    assert ([item.id for item in found.items], found.faults, found.gaps) == (case.ids, [], [])
    with pytest.raises((AssertionError, ValueError), match="an image was opened"):
        case.dataset()[0]  # else nothing is tried here


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dataset_has_the_items_of_its_survey_under_ids_of_their_own(tmp_path: Path, layout: str) -> None:
    case = LAYOUTS[layout](tmp_path)
    found, dataset = case.survey(), case.dataset()
    assert [item.id for item in found.items] == dataset.ids == case.ids
    assert len(set(case.ids)) == len(case.ids) == len(dataset)
    assert [dataset[place].id for place in range(len(dataset))] == case.ids
    assert [item.sample().id for item in found.items] == case.ids
    small = case.loader(**{**case.arguments, "side": 8})
    assert small.ids == case.ids and small[0].image.shape == (8, 8, 3) and small[0].mask.shape == (8, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_survey_lists_as_a_fault_the_constructor_refuses(tmp_path: Path, layout: str) -> None:
    (tmp_path / "whole").mkdir()
    for number, damage in enumerate(LAYOUTS[layout](tmp_path / "whole").damage):
        home = tmp_path / str(number)
        home.mkdir()
        case = LAYOUTS[layout](home)
        case.damage[damage]()
        found = case.survey()
        assert found.faults or found.gaps, damage
        assert bool(found.gaps) == bool(found.without_mask or found.without_image), damage
        with pytest.raises(ValueError) as refusal:
            case.dataset()
        line = str(refusal.value)
        assert line == [*found.faults, *found.gaps][0] and "\n" not in line and "must" in line, damage


def test_every_loader_of_files_keeps_the_contract(tmp_path: Path) -> None:
    for module in pkgutil.iter_modules(segrl.data.__path__):
        importlib.import_module(f"segrl.data.{module.name}")
    loaders = {one for one in ItemDataset.__subclasses__() if one.__module__.startswith("segrl.")}
    cases = {name: make(tmp_path / name) for name, make in LAYOUTS.items() if not (tmp_path / name).mkdir()}
    assert {case.loader for case in cases.values()} == loaders
    for loader in loaders:
        assert inspect.signature(loader.survey).parameters == inspect.signature(loader).parameters
        assert set(loader.whole_split) < set(inspect.signature(loader).parameters)
        assert loader.__len__ is ItemDataset.__len__ and loader.__getitem__ is ItemDataset.__getitem__


def test_a_whole_split_is_counted_whatever_a_run_draws_of_it(tmp_path: Path) -> None:
    case = draws(tmp_path)
    arguments = {**case.arguments, "exclude": [{"refs": str(tmp_path / "r/refs.json"), "splits": ["val"]}]}
    assert not ReferringExpressions.survey(**arguments).items
    whole = ReferringExpressions.survey(**{**arguments, **ReferringExpressions.whole_split})
    assert [item.id for item in whole.items] == ["2-20", "2-21", "1-10"] and not whole.faults
