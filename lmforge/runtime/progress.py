"""What a person sees while steps run: one bar a step with its figures and the time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmforge.step import Report
from lmforge.track.jsonl import Metrics
from lmforge.track.nodes import Tracker

QUIET_S = 20.0  # seconds between lines where there is no terminal


class LiveReport(Report):
    """Bars on the console, metrics and tables to the step's files and to the tracker."""

    def __init__(self, name: str, console: Console, metrics: Metrics, tracker: Tracker | None) -> None:
        self.name, self.console, self.metrics, self.tracker = name, console, metrics, tracker
        self.started = self.spoke = time.monotonic()
        self.bars = Progress(
            TextColumn("{task.description:<18}"), BarColumn(bar_width=28), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=console,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.bar = self.bars.add_task(name, total=None, text="")

    def __enter__(self) -> LiveReport:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To disk first: the JSONL is the truth, the tracker a mirror of its numbers (a skipped step's row numbers are a list)."""
        self.metrics.log(step, metrics)
        if self.tracker:
            self.tracker.log(step, {name: value for name, value in metrics.items() if isinstance(value, (int, float))})

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Move the bar; without a terminal, say so every now and then."""
        self.bars.update(self.bar, completed=done, total=total, text=text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.spoke >= QUIET_S:
            self.spoke = now
            left = (now - self.started) * (total - done) / max(done, 1)
            self.console.print(f"{self.name}: {done}/{total} {text}, about {left:.0f} s left", highlight=False)

    def sample(self, title: str, text: str) -> None:
        """Sent to the tracker; the step's metrics keep it for the end of the run."""
        if self.tracker:
            self.tracker.text(title, text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """To samples.jsonl first, then to the tracker."""
        self.metrics.table(title, columns, rows)
        if self.tracker:
            self.tracker.table(title, columns, rows)
