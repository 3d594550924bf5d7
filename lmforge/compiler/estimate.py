"""estimate: exact parameter counts, FLOPs by the stated convention, and the static memory of training.

Static memory is parameters, gradients and optimizer states. Activations, time and money are not estimated here and stay null.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmforge.compiler.resolve import flops_per_token
from lmforge.compiler.scaling import scaled
from lmforge.errors import PlanError
from lmforge.hardware.nodes import Machine
from lmforge.model.families import Weight
from lmforge.model.weights import ParamCount, count, sizes, splits, weights
from lmforge.parallel.nodes import Part
from lmforge.parallel.shards import Cut
from lmforge.parallel.traffic import Moved
from lmforge.plan import Cost, PeakBytes, Plan, Step
from lmforge.precision.nodes import dtype_bytes
from lmforge.stage.base import Load, TrainingStage, parameters

GIB = 2**30


def estimate(plan: Plan) -> Plan:
    """The plan with costs; PlanError where the static memory alone does not fit the device."""
    config = plan.experiment.model.config()
    params, parts = count(config), list(weights(config))
    machine = plan.experiment.hardware.machine()
    return scaled(dataclasses.replace(plan, steps=tuple(_at_best(_fits(_costed(step, params, parts, config), machine), machine) for step in plan.steps)))


def _costed(step: Step, params: ParamCount, parts: list[Weight], config: Mapping[str, Any]) -> Step:
    if not isinstance(step.spec, TrainingStage):
        if "checkpoint" not in {step.produces, *(one.kind for one in step.inputs)}:
            return step
        return dataclasses.replace(step, cost=Cost(params_total=params.total, params_active=params.active))
    stage = step.spec
    assert stage.budget.steps is not None
    assert stage.seq_len is not None
    tokens = stage.budget.steps * (stage.optimizer.global_batch_tokens or 0)
    cut = Cut(step.placement.mesh, splits(config), params.layers)
    moved = _moved(step, stage, parts, sizes(config).hidden_size)
    cost = Cost(
        params_total=params.total,
        params_active=params.active,
        params_trainable=parameters(stage.load(parts).trained),
        tokens=tokens,
        train_flops=float(tokens * flops_per_token(params, stage.seq_len)),
        peak_bytes_per_device=_flat(step, stage, parts) if stage.parallel.flat else _static(stage, parts, cut),
        communication=stage.parallel.sends(cut, moved),
    )
    said = "" if stage.parallel.flat else cut.said()
    return dataclasses.replace(step, cost=cost, arithmetic=(*step.arithmetic, *([said] if said else [])))


def _flat(step: Step, stage: TrainingStage, parts: list[Weight]) -> PeakBytes:
    """Bytes on one device where all tensors are one buffer that is split as the parallel option says; each share is rounded up."""
    devices, width, load = step.placement.devices, stage.precision.param_bytes, stage.load(parts)
    trained = parameters(load.trained) * width
    states = sum(stage.optimizer.state_bytes(one.shape, one.name, width) * one.count for one in load.trained)
    amounts: dict[Part, int] = {"params": trained + stage.base_bytes(parts), "grads": trained, "optimizer": states}
    here = {part: -(-amount // stage.parallel.shard_degree(part, devices)) for part, amount in amounts.items()}
    return _kept(stage, load, here)


def _static(stage: TrainingStage, parts: list[Weight], cut: Cut) -> PeakBytes:
    """Bytes on the fullest device of a mesh, tensor by tensor. Gradients are those that an update finds."""
    width, load = stage.precision.param_bytes, stage.load(parts)
    found = []
    for at in cut.first_ranks():
        mine = cut.held_at(load.trained, at)
        trained = sum(one.numel for one in mine) * width
        gradients = sum(one.numel for one in cut.gradients_at(load.trained, at)) * width
        states = sum(stage.optimizer.state_bytes(one.shape, one.name, width) * one.count for one in mine)
        found.append(_kept(stage, load, {"params": trained + _base(stage, parts, load, cut, at), "grads": gradients, "optimizer": states}))
    return max(found, key=lambda one: one.static)


def _base(stage: TrainingStage, parts: list[Weight], load: Load, cut: Cut, at: Mapping[str, int]) -> int:
    """Bytes of the base under an adapter on one rank. A quantized one has scales beside its codes, so its share is that of all its bytes."""
    here, whole = sum(one.numel for one in cut.held_at(load.base, at)) * stage.precision.param_bytes, parameters(load.base) * stage.precision.param_bytes
    kept = stage.base_bytes(parts)
    return here if kept == whole else -(-kept // cut.mesh["dp_shard"])


def _kept(stage: TrainingStage, load: Load, here: Mapping[Part, int]) -> PeakBytes:
    """Without what lies in host memory, and with the models beside the trained one, which every device has whole."""
    on_device = {part: 0 if stage.parallel.offloads(part) else amount for part, amount in here.items()}
    beside = parameters(load.frozen) * stage.precision.param_bytes
    return PeakBytes(params=on_device["params"] + beside, grads=on_device["grads"], optimizer=on_device["optimizer"])


def _moved(step: Step, stage: TrainingStage, parts: list[Weight], hidden_size: int) -> Moved:
    """What its ranks have to send each other in a step."""
    load, precision = stage.load(parts), stage.precision
    return Moved(
        trained=load.trained,
        base=load.base,
        micro_batches=step.placement.accumulation or 1,
        tokens=(step.placement.micro_batch_size or 1) * stage.row_tokens,
        width=hidden_size,
        recomputes=stage.parallel.activation_checkpointing != "none",
        param_bytes=precision.param_bytes,
        compute_bytes=dtype_bytes(precision.compute_dtype),
        reduce_bytes=dtype_bytes(precision.reduce_dtype),
    )


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
