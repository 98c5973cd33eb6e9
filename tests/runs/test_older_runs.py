"""Configurations of older runs are read under the present names of their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import get_object

from segrl.runs import resuming
from segrl.runs.schema.table import PARTS


@pytest.mark.parametrize(("old", "new"), resuming._MOVED.items())
def test_a_part_that_moved_is_found_where_it_is(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "config.yaml").write_text(f"a: [{{_target_: {old}}}]\nb: {{_target_: {old}.x}}\n")
    read = resuming.read(tmp_path / "config.yaml", "resume")
    assert read.a[0]._target_ == new and read.b._target_ == f"{old}.x"
    assert any(new in parts for parts in PARTS.values()) and callable(get_object(new))
    with pytest.raises(Exception, match="Error"):
        get_object(old)
