"""What one step of a plan is made of: a node that runs, the folder it works in, and how it speaks while it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lmforge.registry import Node


@dataclass(frozen=True)
class Placement:
    """Where a step runs. `micro_batch_size` is in rows (a packed sequence, or a preference pair) per device."""

    devices: int = 1
    mesh: Mapping[str, int] = field(default_factory=dict)
    micro_batch_size: int | None = None
    accumulation: int | None = None
    strategy: Mapping[str, Any] = field(default_factory=dict)  # what the parallel option is emitted as


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A whole model that a step opens on one device and runs without gradients, as the memory of both is predicted from."""

    rows: int  # sequences at once
    length: int  # tokens of each
    shorter: bool = False  # whether they may as well be far shorter: only what the shortest need is refused
    dtype: str | None = None  # that its weights are opened in; None = the one they were saved in
    new: int = 0  # tokens drawn after each, with a cache of keys and values; logits are then of the last token only
    chunked: bool = False  # whether log-probs are taken of a part of the logits at a time
    beside: bool = False  # a second model as large, with random weights in float32


class Report:
    """How a running step speaks; this one is silent, the runner's draws bars and writes metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one interval (loss, grad_norm, lr, tokens_per_s, ...), by optimizer step."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """How far the step is: `done` of `total` units, and a short text beside the bar."""

    def sample(self, title: str, text: str) -> None:
        """A piece of text a person should see, such as generated text."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table a person should see, such as answers with their rewards, at the step that was logged last; one title may come at many steps."""


@dataclass(frozen=True)
class Context:
    """What a running step is given. Artifacts are folders; `out` is where this step's own one goes."""

    step: str  # the step's name in the plan
    folder: Path  # the step's folder: step.json, metrics.jsonl, state/ while it runs
    out: Path  # folder / <what it produces>; exists and is empty, or holds what an interrupted run left
    inputs: Mapping[str, Path]  # artifact kind -> folder
    placement: Placement = field(default_factory=Placement)
    report: Report = field(default_factory=Report)


class StepNode(Node):
    """A node that runs as a step. `code_revision` rises when its meaning changes, so that a fixed bug never says done."""

    code_revision: ClassVar[int] = 1
    consumes: ClassVar[tuple[str, ...]] = ()  # artifact kinds: corpus tokenizer tokens:<view> checkpoint adapter reference reward_model ...
    produces: ClassVar[str] = ""

    def takes(self) -> tuple[str, ...]:
        """What this very node consumes, where its keys decide it; the compiler asks here."""
        return self.consumes

    def makes(self) -> str:
        """What this very node produces, where its keys decide it; the compiler asks here."""
        return self.produces

    @classmethod
    def made_for(cls, consumer: Node) -> StepNode | None:
        """The step that makes what `consumer` lacks, where nothing before it does; None where it takes more than a class to say."""
        return None if dataclasses.fields(cls) else cls()  # type: ignore[arg-type]  # every registered node is a dataclass

    def content(self, cache: Path | None) -> str:
        """What decides the result beyond the node's own keys: a fingerprint of local files, of a model's config."""
        return ""

    def reads(self, length: int) -> Reading | None:
        """The model it opens and what it runs through it at once, of sequences of `length` tokens; None where it opens none, or trains it."""
        return None

    def preflight(self) -> None:
        """Refuse now what would fail after hours; called for every step that is not done, before the first one runs."""

    def run(self, context: Context) -> dict[str, Any]:
        """Do the work, fill `context.out`, return JSON-able metrics. Imports torch only in here."""
        raise RuntimeError(f"{type(self).__name__} has no run()")
