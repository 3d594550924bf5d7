"""estimate: exact parameter counts, FLOPs by the stated convention, memory by part, time with a band, money and energy (see lmforge.predict)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmforge.compiler.resolve import flops_per_token
from lmforge.compiler.scaling import scaled
from lmforge.errors import PlanError
from lmforge.hardware.nodes import Machine
from lmforge.model.weights import ParamCount, count
from lmforge.plan import Band, Cost, PeakBytes, Plan, Step
from lmforge.predict import static
from lmforge.predict.demand import moved
from lmforge.predict.job import Job
from lmforge.predict.memory import peak
from lmforge.predict.money import bill
from lmforge.predict.time import seconds
from lmforge.stage.base import TrainingStage, parameters

GIB = 2**30


def estimate(plan: Plan) -> Plan:
    """The plan with costs; PlanError where the static memory alone does not fit the device."""
    config = plan.experiment.model.config()
    params = count(config)
    machine = plan.experiment.hardware.machine()
    return scaled(dataclasses.replace(plan, steps=tuple(_at_best(_fits(_costed(step, params, machine, config), machine), machine) for step in plan.steps)))


def _costed(step: Step, params: ParamCount, machine: Machine, config: Mapping[str, Any]) -> Step:
    if not isinstance(step.spec, TrainingStage):
        if "checkpoint" not in {step.produces, *(one.kind for one in step.inputs)}:
            return step
        return dataclasses.replace(step, cost=Cost(params_total=params.total, params_active=params.active))
    stage = step.spec
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
    said = "" if stage.parallel.flat else job.cut.said()
    return dataclasses.replace(step, cost=cost, arithmetic=(*step.arithmetic, *([said] if said else [])))


def _memory(job: Job, machine: Machine) -> PeakBytes:
    """Between steps, and at the fullest moment of one where that is known of the model."""
    held, fullest = static.fullest(job), peak(job, machine)
    between = PeakBytes(params=held.params + held.base + held.beside, grads=held.grads, optimizer=held.optimizer)
    if fullest is None:
        return between
    parts = {name: size for name, size in fullest.parts.items() if size}
    return dataclasses.replace(between, parts=parts, moment=fullest.moment, total=fullest.total)


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


def _fits(step: Step, machine: Machine) -> Step:
    need = step.cost.peak_bytes_per_device.static
    room = machine.memory_per_device(step.placement.devices)
    if need <= room:
        return step
    peak = step.cost.peak_bytes_per_device
    parts = ", ".join(f"{name} {(getattr(peak, name) or 0) / GIB:.1f}" for name in ("params", "grads", "optimizer"))
    raise PlanError(
        step.name,
        f"needs {need / GIB:.1f} GiB on each of {step.placement.devices} device(s) before activations ({parts}), "
        f"and {machine.name} has {room / GIB:.1f} GiB for each",
        "type a smaller model=, parallel=fsdp over more devices, or plan for another hardware= (list hardware)",
    )


def _at_best(step: Step, machine: Machine) -> Step:
    """Where no time is predicted, with that which no run can beat: every device at its stated dense peak. A bound, no estimate: `seconds` stays null."""
    if not isinstance(step.spec, TrainingStage) or step.cost.train_flops is None or step.cost.step_seconds is not None:
        return step
    dtype, devices = step.spec.precision.compute_dtype, step.placement.devices
    peak = machine.peak_flops.of(dtype)
    if peak is None:
        return step
    hours = step.cost.train_flops / (peak * devices * 3600)
    time = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    line = f"at least {time} h, with {devices} device(s) at the stated peak of {peak / 1e12:.4g} TFLOP/s ({dtype})"
    return dataclasses.replace(step, arithmetic=(*step.arithmetic, line))
