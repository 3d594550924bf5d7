"""estimate: exact parameter counts, FLOPs by the stated convention, memory by part, time with a band, money and energy (see lmforge.predict)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmforge.compiler import opened
from lmforge.compiler.machine import machine_of
from lmforge.compiler.resolve import flops_per_token
from lmforge.compiler.scaling import scaled
from lmforge.explain.words import gib
from lmforge.hardware.nodes import Machine
from lmforge.model.weights import ParamCount, count
from lmforge.plan import Band, Cost, PeakBytes, Plan, Step
from lmforge.predict import static
from lmforge.predict.demand import moved
from lmforge.predict.job import Job
from lmforge.predict.memory import Peak, peak
from lmforge.predict.money import bill
from lmforge.predict.time import missing, seconds
from lmforge.stage.base import TrainingStage, parameters


def estimate(plan: Plan) -> Plan:
    """The plan with costs."""
    config = plan.experiment.model.config()
    params = count(config)
    machine, here = machine_of(plan), plan.experiment.hardware.type == "here"
    by_name = {step.name: step for step in plan.steps}

    def costed(step: Step) -> Step:
        return _trained(step, params, machine, config, here) if isinstance(step.spec, TrainingStage) else _read(step, by_name, params, machine, config)

    return scaled(dataclasses.replace(plan, steps=tuple(map(costed, plan.steps))))


def _read(step: Step, by_name: Mapping[str, Step], params: ParamCount, machine: Machine, config: Mapping[str, Any]) -> Step:
    """A step that trains nothing: how large the model is that it takes or makes, and what running it needs."""
    if "checkpoint" not in {step.produces, *(one.kind for one in step.inputs)}:
        return step
    found = opened.peak(step, by_name, config, machine)
    needed = PeakBytes() if found is None else _fullest(PeakBytes(params=found.parts["params"] + found.parts["beside"]), found)
    return dataclasses.replace(step, cost=Cost(params_total=params.total, params_active=params.active, peak_bytes_per_device=needed))


def _trained(step: Step, params: ParamCount, machine: Machine, config: Mapping[str, Any], here: bool) -> Step:
    stage = step.spec
    assert isinstance(stage, TrainingStage)
    assert stage.budget.steps is not None
    assert stage.seq_len is not None
    tokens = stage.budget.steps * (stage.optimizer.global_batch_tokens or 0)
    job = Job(config, stage, step.placement)
    cost = Cost(
        params_total=params.total,
        params_active=params.active,
        params_trainable=parameters(job.load.trained),
        tokens=tokens,
        train_flops=float(tokens * flops_per_token(params, stage.seq_len)),
        peak_bytes_per_device=_memory(job, machine),
        communication=stage.parallel.sends(job.cut, moved(job)),
        **_time(job, machine),
    )
    said = ("" if stage.parallel.flat else job.cut.said(), _offloaded(job, machine), _untimed(job, machine, here))
    return dataclasses.replace(step, cost=cost, arithmetic=(*step.arithmetic, *filter(None, said)))


def _memory(job: Job, machine: Machine) -> PeakBytes:
    """Between steps, and at the fullest moment of one where that is known of the model."""
    held, fullest = static.fullest(job, machine.accelerator), peak(job, machine)
    between = PeakBytes(params=held.params + held.base + held.beside, grads=held.grads, optimizer=held.optimizer)
    return between if fullest is None else _fullest(between, fullest)


def _fullest(between: PeakBytes, at: Peak) -> PeakBytes:
    parts = {name: size for name, size in at.parts.items() if size}
    return dataclasses.replace(between, parts=parts, moment=at.moment, total=at.total)


def _time(job: Job, machine: Machine) -> dict[str, Any]:
    """What a Cost holds of time; nothing where the machine's figures are not known."""
    step = seconds(job, machine)
    if step is None:
        return {}
    paid = bill(step, job.stage.budget.steps or 0, machine)
    return {
        "step_seconds": Band(low=step.low, expected=step.total, high=step.high),
        "step_parts": dict(step.parts),
        "tokens_per_second": step.tokens_per_s,
        "mfu": step.mfu,
        "hfu": step.hfu,
        "seconds": paid.hours * 3600,
        "device_hours": paid.device_hours,
        "money": paid.money,
        "energy_kwh": paid.energy_kwh,
    }


def _offloaded(job: Job, machine: Machine) -> str:
    """What lies in the memory of a node's host, of which no key says how much there is."""
    here = min(machine.devices_per_node, job.placement.devices)
    away = static.offloaded(job) * here if machine.accelerator == "cuda" else 0
    return f"offloaded: {gib(away)} in each node's host memory, of which no more is known" if away else ""


def _untimed(job: Job, machine: Machine, here: bool) -> str:
    """What a time would need, where there is none."""
    keys = ", ".join(missing(job, machine))
    instead = "type python -m lmforge calibrate" if here else "give them for a time"
    return f"no time: {keys} not known; {instead}" if keys else ""
