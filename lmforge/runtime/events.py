"""Rank 0's report travels as lines of JSON in a file, which the process that drives the step says again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lmforge.step import Report
from lmforge.track.jsonl import plain

EVENTS = "events.jsonl"  # in the step's folder while its ranks run


class FileReport(Report):
    """Rank 0's side."""

    def __init__(self, file: Path) -> None:
        self.handle = file.open("a", buffering=1)

    def _say(self, verb: str, *arguments: Any) -> None:
        self.handle.write(json.dumps([verb, arguments]) + "\n")

    def log(self, step: int, metrics: Any) -> None:
        """Metrics of one interval."""
        self._say("log", step, dict(metrics))

    def progress(self, done: int, total: int, text: str = "") -> None:
        """How far the step is."""
        self._say("progress", done, total, text)

    def sample(self, title: str, text: str) -> None:
        """A piece of text for people."""
        self._say("sample", title, text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table for people."""
        self._say("table", title, list(columns), plain(rows))


class Lines:
    """The driver's side. The last line may be there in part."""

    def __init__(self, events: TextIO, report: Report) -> None:
        self.events, self.report, self.pending = events, report, ""

    def pass_on(self) -> None:
        """Say again what has come since the last call."""
        for line in self.events:
            self.pending += line
            if self.pending.endswith("\n"):
                verb, arguments = json.loads(self.pending)
                self.pending = ""
                getattr(self.report, verb)(*arguments)
