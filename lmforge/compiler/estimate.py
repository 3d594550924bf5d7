"""estimate: exact parameter counts, FLOPs by the stated convention, and the static memory of training.

Static memory is parameters, gradients and optimizer states. Activations, time and money are not estimated here and stay null.
"""

from __future__ import annotations

import dataclasses

from lmforge.compiler.resolve import flops_per_token
from lmforge.errors import PlanError
from lmforge.hardware.nodes import Machine
from lmforge.model.families import Weight
from lmforge.model.weights import ParamCount, count, weights
from lmforge.parallel.nodes import Part
from lmforge.plan import Cost, PeakBytes, Plan, Step
from lmforge.stage.base import TrainingStage, parameters

GIB = 2**30


def estimate(plan: Plan) -> Plan:
    """The plan with costs; PlanError where the static memory alone does not fit the device."""
    config = plan.experiment.model.config()
    params, parts = count(config), list(weights(config))
    machine = plan.experiment.hardware.machine()
    return dataclasses.replace(plan, steps=tuple(_at_best(_fits(_costed(step, params, parts), machine), machine) for step in plan.steps))


def _costed(step: Step, params: ParamCount, parts: list[Weight]) -> Step:
    if not isinstance(step.spec, TrainingStage):
        if "checkpoint" not in {step.produces, *(one.kind for one in step.inputs)}:
            return step
        return dataclasses.replace(step, cost=Cost(params_total=params.total, params_active=params.active))
    stage = step.spec
    assert stage.budget.steps is not None
    assert stage.seq_len is not None
    tokens = stage.budget.steps * (stage.optimizer.global_batch_tokens or 0)
    cost = Cost(
        params_total=params.total,
        params_active=params.active,
        params_trainable=parameters(stage.load(parts).trained),
        tokens=tokens,
        train_flops=float(tokens * flops_per_token(params, stage.seq_len)),
        peak_bytes_per_device=_static(step, stage, parts),
    )
    return dataclasses.replace(step, cost=cost)


def _static(step: Step, stage: TrainingStage, parts: list[Weight]) -> PeakBytes:
    """Bytes on one device, sharded as the parallel option says; each shard is rounded up. Frozen weights have neither gradients nor states."""
    devices, width, load = step.placement.devices, stage.precision.param_bytes, stage.load(parts)
    trained = parameters(load.trained) * width
    states = sum(stage.optimizer.state_bytes(one.shape, one.name, width) * one.count for one in load.trained)
    amounts: dict[Part, int] = {"params": trained + stage.frozen_bytes(parts), "grads": trained, "optimizer": states}
    here = {part: 0 if stage.parallel.offloads(part) else -(-amount // stage.parallel.shard_degree(part, devices)) for part, amount in amounts.items()}
    return PeakBytes(**here)


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
    """With the time no run can beat: every device at its stated dense peak. It is a bound, no estimate, so `seconds` stays null."""
    if not isinstance(step.spec, TrainingStage) or step.cost.train_flops is None:
        return step
    dtype, devices = step.spec.precision.compute_dtype, step.placement.devices
    peak = machine.peak_flops.of(dtype)
    if peak is None:
        return step
    hours = step.cost.train_flops / (peak * devices * 3600)
    time = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    line = f"at least {time} h, with {devices} device(s) at the stated peak of {peak / 1e12:.4g} TFLOP/s ({dtype})"
    return dataclasses.replace(step, arithmetic=(*step.arithmetic, line))
