"""A service that fails must not take a training run with it, and must not fail unheard."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmforge.track.nodes import ArtifactRef, Say, Tracker

SECRETS = ("WANDB_API_KEY",)


def one_line(error: BaseException) -> str:
    """An error on one line, its secrets struck out: services put what they were given into their messages."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name in SECRETS:
        if secret := os.environ.get(name):
            line = line.replace(secret, f"<{name}>")
    return line


class Silent:
    """Mirrors nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def text(self, title: str, text: str) -> None: ...

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None: ...

    def artifact(self, made: ArtifactRef, inputs: Sequence[ArtifactRef]) -> None: ...

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None: ...


class Guard:
    """Passes everything on until the first failure, says that one, and is silent from then on."""

    def __init__(self, tracker: Tracker, name: str, say: Say) -> None:
        self._tracker: Tracker = tracker
        self._name, self._say = name, say

    def _try(self, call: Callable[[Tracker], None]) -> None:
        try:
            call(self._tracker)
        except Exception as error:  # noqa: BLE001 - whatever a service throws, the run goes on
            self._tracker = Silent()
            self._say(f"track: {self._name} stopped ({one_line(error)}); the run goes on, metrics.jsonl has everything")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda tracker: tracker.log(step, metrics))

    def text(self, title: str, text: str) -> None:
        self._try(lambda tracker: tracker.text(title, text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self._try(lambda tracker: tracker.table(title, columns, rows))

    def artifact(self, made: ArtifactRef, inputs: Sequence[ArtifactRef]) -> None:
        self._try(lambda tracker: tracker.artifact(made, inputs))

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        self._try(lambda tracker: tracker.finish(summary, exit_code))
