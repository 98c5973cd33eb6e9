"""Findings of a part: one JSON line each, printed at once and appended to `$OUT/results.jsonl`."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Findings:
    """What one part has found.

    Args:
        part: its name.
    """

    def __init__(self, part: str) -> None:
        self.part, self.began = part, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds since the part began."""
        return time.perf_counter() - self.began

    def say(self, **line: Any) -> None:
        """Write down a finding."""
        text = json.dumps({"part": self.part, "at_s": round(self.seconds, 1), **line}, default=str)
        print(text, flush=True)
        if out := os.environ.get("OUT"):
            with (Path(out) / "results.jsonl").open("a") as file:
                file.write(text + "\n")

    def tried(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what `work` returns; if it raises, write the error down as a finding and go on."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - any error is a finding, and the part goes on
            traceback.print_exc()
            self.say(name=name, error=f"{type(error).__name__}: {str(error)[:400]}")
            return None
