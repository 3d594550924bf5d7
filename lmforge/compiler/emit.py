"""emit: a plan's steps become jobs, each with the folders it reads and the one it fills. The nodes bring torch in when they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmforge.plan import Plan, Step
from lmforge.step import Context, Report


@dataclass(frozen=True)
class Job:
    """A step bound to folders."""

    step: Step
    folder: Path
    inputs: Mapping[str, Path]

    def run(self, report: Report) -> dict[str, Any]:
        """Run in this process; returns the step's metrics."""
        out = self.folder / self.step.produces
        out.mkdir(parents=True, exist_ok=True)
        return self.step.spec.run(Context(step=self.step.name, folder=self.folder, out=out, inputs=self.inputs, placement=self.step.placement, report=report))


def emit(plan: Plan, folder: Callable[[Step], Path]) -> Iterator[Job]:
    """A job per step, each emitted when it is asked for: by then `folder` knows where the steps before it really lie.

    An artifact is the folder named by what its step produces, inside the step's own.
    """
    for step in plan.steps:
        made = {name: plan.step(name) for name in {one.step for one in step.inputs}}
        inputs = {one.kind: folder(made[one.step]) / made[one.step].produces for one in step.inputs}
        yield Job(step=step, folder=folder(step), inputs=inputs)
