"""place: where each step runs, with micro-batches and activation checkpointing that fit its devices. What cannot fit is refused, with what would."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lmforge.compiler import opened
from lmforge.compiler.cut import micro_batches, placed
from lmforge.compiler.machine import machine_of
from lmforge.compiler.verdict import Verdict, verdict
from lmforge.errors import PlanError, Problem
from lmforge.explain.words import gib
from lmforge.hardware.nodes import Machine
from lmforge.parallel.nodes import CHECKPOINTING
from lmforge.plan import Plan, Step
from lmforge.stage.base import TrainingStage
from lmforge.step import Placement


def place(plan: Plan) -> Plan:
    """The plan with a placement for every step; PlanError for each that does not fit."""
    config, machine = plan.experiment.model.config(), machine_of(plan)
    problems: list[Problem] = []
    steps = []
    by_name = {step.name: step for step in plan.steps}
    for step in plan.steps:
        if not isinstance(step.spec, TrainingStage):
            steps.append(dataclasses.replace(step, placement=Placement(devices=1)))
            read = opened.peak(step, by_name, config, machine, least=True)
            if read is not None and read.total > machine.memory_per_device(1):
                problems.append(opened.refusal(step, read, machine))
            continue
        found = fitted(step, config, machine)
        if isinstance(found, Verdict):
            problems.append(_refusal(plan, step, found, machine))
        else:
            steps.append(found)
    if problems:
        raise PlanError.of(problems)
    return dataclasses.replace(plan, steps=tuple(steps))


def fitted(step: Step, config: Mapping[str, Any], machine: Machine) -> Step | Verdict:
    """The step as it will run, its null keys settled; where it does not fit, what the least of it needs."""
    ways = list(_ways(step, machine))
    first = verdict(ways[0], config, machine)
    if first.fits:
        return first.step
    tried = [first, *(verdict(one, config, machine) for one in ways[1:])]
    good = [one for one in tried if one.fits]
    if not good:
        return min(tried, key=lambda one: one.need)
    best = min(good, key=Verdict.order)
    line = f"{_way(best)}: the fastest that fits {gib(best.room)} ({_way(first)}: {gib(first.need)})"
    return dataclasses.replace(best.step, arithmetic=(*best.step.arithmetic, line))


def _way(one: Verdict) -> str:
    """`selective activation checkpointing and 2 rows at once`."""
    again, rows = one.stage.parallel.checkpointing, one.step.placement.micro_batch_size
    return f"{'no' if again == 'none' else again} activation checkpointing and {rows} row{'' if rows == 1 else 's'} at once"


def _ways(step: Step, machine: Machine) -> Iterator[Step]:
    """The step placed with each value of the keys that are null: first without checkpointing and with as many rows at once as may be."""
    assert isinstance(step.spec, TrainingStage)
    parallel = step.spec.parallel
    for checkpointing in [parallel.activation_checkpointing] if parallel.activation_checkpointing else CHECKPOINTING:
        for rows in [parallel.micro_batch_size] if parallel.micro_batch_size else micro_batches(step, machine.devices):
            keys = {"activation_checkpointing": checkpointing, "micro_batch_size": rows}
            yield placed(with_keys(step, keys), machine.devices)


def with_keys(step: Step, keys: Mapping[str, Any]) -> Step:
    """The step with other keys of `parallel`."""
    assert isinstance(step.spec, TrainingStage)
    return dataclasses.replace(step, spec=dataclasses.replace(step.spec, parallel=dataclasses.replace(step.spec.parallel, **keys)))


def _refusal(plan: Plan, step: Step, least: Verdict, machine: Machine) -> Problem:
    """What the step needs at the least, its largest parts, and the nearest plans that fit."""
    from lmforge.compiler.nearest import nearest

    devices = least.step.placement.devices
    where = f"on each of {devices} devices" if devices > 1 else "on one device"
    parts = ", ".join(f"{part} {gib(size)}" for part, size in sorted(least.parts.items(), key=lambda one: -one[1])[:3])
    what = f"needs {gib(least.need)} of {gib(least.room)} {where} of {machine.name} ({parts})"
    return Problem(f"stage.{step.name}", what, nearest(plan, step, least, machine, fitted))
