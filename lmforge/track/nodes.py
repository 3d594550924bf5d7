"""Where metrics go besides the step's own metrics.jsonl, which is always written and is the truth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from lmforge.registry import Key, Node, register

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker shows of one step's run."""

    id: str  # unique per step and digest; a resumed step keeps it
    name: str
    experiment: str  # runs of one experiment are grouped
    stage: str  # the kind of job within it
    config: Mapping[str, Any]  # the plan of this step, as plain data
    folder: Path  # the step's folder, where files go unless a key names another
    resumed_from: int | None = None  # optimizer step of the state it goes on from


@dataclass(frozen=True)
class ArtifactRef:
    """An artifact as a tracker knows it: a name that identifies its content (step and digest), its kind, where it lies."""

    name: str
    kind: str
    folder: Path


class Tracker(Protocol):
    """Mirrors one run. A service that fails says so once and never stops the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one optimizer step; steps do not go back."""

    def text(self, title: str, text: str) -> None:
        """A piece of text beside the metrics of the last step, such as generated text."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table beside the metrics of the last step, such as answers with their rewards; one title may come at many steps."""

    def artifact(self, made: ArtifactRef, inputs: Sequence[ArtifactRef]) -> None:
        """Lineage: this run read `inputs` and made `made`. Files are referred to, never uploaded."""

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Final metrics; a nonzero `exit_code` marks the run as failed."""


def to_stderr(line: str) -> None:
    """How a tracker speaks where the caller gives no other way."""
    print(line, file=sys.stderr)


class Track(Node):
    """Where metrics are mirrored; it never decides what a step computes."""

    group = "track"
    identity = False

    def open(self, run: RunInfo, say: Say = to_stderr) -> Tracker:
        """Start mirroring a run; RunError where a package is missing."""
        raise NotImplementedError


@register("track", "none")
class Nowhere(Track):
    """Only the step's own metrics.jsonl."""

    def open(self, run: RunInfo, say: Say = to_stderr) -> Tracker:
        from lmforge.track.guard import Silent

        return Silent()


@register("track", "wandb")
class Wandb(Track):
    """Weights & Biases: experiment = group, stage = job type, the plan = config, lineage by artifacts that refer to local folders."""

    project: Annotated[str, Key("W&B project")]
    entity: Annotated[str | None, Key("W&B user or team; null = the login's own")]
    mode: Annotated[
        Literal["auto", "offline", "online", "disabled"],
        Key("auto = WANDB_MODE if set, else online when logged in and reachable, else offline"),
    ]
    dir: Annotated[str | None, Key("folder that gets wandb/; null = the step's folder")]
    system_metrics: Annotated[bool, Key("sample GPU, CPU and memory use in the background")]

    def open(self, run: RunInfo, say: Say = to_stderr) -> Tracker:
        from lmforge.track import wandb

        return wandb.start(self, run, say)


@register("track", "tensorboard")
class TensorBoard(Track):
    """TensorBoard event files; `tensorboard --logdir outputs` shows every run below it."""

    needs = {"tensorboard": "tensorboard"}  # noqa: RUF012

    dir: Annotated[str | None, Key("folder for <experiment>/<run>; null = tensorboard/ in the step's folder")]
    flush_s: Annotated[float, Key("seconds between writes of event files", unit="s", gt=0)]

    def open(self, run: RunInfo, say: Say = to_stderr) -> Tracker:
        from lmforge.track import tensorboard

        return tensorboard.start(self, run, say)
