"""What a placed training step needs of its device and how long it takes: all that fitting and searching ask of the predictions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmforge.hardware.nodes import Machine
from lmforge.parallel.nodes import CHECKPOINTING
from lmforge.plan import Step
from lmforge.predict import static
from lmforge.predict.job import Job
from lmforge.predict.memory import peak
from lmforge.predict.time import seconds
from lmforge.stage.base import TrainingStage


@dataclass(frozen=True)
class Verdict:
    """A step on its placement. `parts` are bytes of the fullest device at its fullest moment, or what is static of a model that nobody has followed."""

    step: Step
    parts: Mapping[str, int]
    room: int  # bytes of a device
    time: Callable[[], float | None]  # asked for what fits only

    @functools.cached_property
    def seconds(self) -> float | None:
        """Of an optimizer step; None where the machine's figures are not known."""
        return self.time()

    @property
    def stage(self) -> TrainingStage:
        assert isinstance(self.step.spec, TrainingStage)
        return self.step.spec

    @functools.cached_property
    def need(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.need <= self.room

    @property
    def largest(self) -> tuple[str, int]:
        """The part that takes most."""
        return max(self.parts.items(), key=lambda one: one[1])

    def order(self) -> tuple[float, int, int]:
        """The best first: seconds where they are known, then the least that is computed again, then the most rows at once."""
        return (self.seconds or 0.0, CHECKPOINTING.index(self.stage.parallel.checkpointing), -(self.step.placement.micro_batch_size or 0))


def verdict(step: Step, config: Mapping[str, Any], machine: Machine) -> Verdict:
    """What is predicted of a step that has been placed."""
    assert isinstance(step.spec, TrainingStage)
    job = Job(config, step.spec, step.placement)

    def time() -> float | None:
        found = seconds(job, machine)
        return None if found is None else found.total

    return Verdict(step, needs(job, machine), machine.memory_per_device(step.placement.devices), time)


def needs(job: Job, machine: Machine) -> Mapping[str, int]:
    """Bytes of its fullest device by part: at the fullest moment, or what is static of a model that nobody has followed."""
    found = peak(job, machine)
    if found is not None:
        return dict(found.parts)
    held = static.fullest(job, machine.accelerator)
    return {field.name: getattr(held, field.name) for field in dataclasses.fields(held) if field.name != "stage"}
