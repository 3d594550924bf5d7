"""place: where each step runs, and how its global batch is cut into micro-batches."""

from __future__ import annotations

import dataclasses

from lmforge.errors import PlanError
from lmforge.model.weights import nearest_divisors
from lmforge.parallel.layout import data_degree
from lmforge.plan import Plan, Step
from lmforge.stage.nodes import TrainingStage
from lmforge.step import Placement

MICRO_BATCH_TOKENS = 8192  # tokens a device takes at once where no micro_batch_size is given


def place(plan: Plan) -> Plan:
    """The plan with a placement for every step."""
    available = plan.experiment.hardware.machine().devices
    return dataclasses.replace(plan, steps=tuple(_placed(step, available) for step in plan.steps))


def _placed(step: Step, available: int) -> Step:
    if not isinstance(step.spec, TrainingStage):
        return dataclasses.replace(step, placement=Placement(devices=1))
    stage, parallel = step.spec, step.spec.parallel
    devices = parallel.world(available)
    mesh = parallel.mesh(devices)
    ranks = data_degree(mesh)
    batch = stage.optimizer.global_batch_tokens or 0
    rows = batch // stage.row_tokens
    where = f"stage.{step.name}"
    if rows % ranks:
        share = ranks * mesh["pp"]  # a pipeline wants a micro-batch a stage
        near = max(1, round(rows / share)) * share * stage.row_tokens
        raise PlanError(f"{where}.optimizer.global_batch_tokens", f"{rows} rows do not split over {ranks} devices", f"type {near}, or fewer parallel.devices")
    each = rows // ranks
    # A pipeline of few micro-batches stands idle for most of a step.
    most = min(MICRO_BATCH_TOKENS // stage.row_tokens, each // mesh["pp"] if mesh["pp"] > 1 else each)
    micro = parallel.micro_batch_size or largest_divisor(each, most)
    if each % micro:
        raise PlanError(f"{where}.parallel.micro_batch_size", f"{micro} does not divide the {each} rows a device has", f"type {nearest_divisors(each, micro)}")
    if each // micro < mesh["pp"]:
        many = "micro-batch" if each == micro else "micro-batches"
        what = f"{each // micro} {many} of {micro} rows {'is' if each == micro else 'are'} fewer than the {mesh['pp']} stages of the pipeline"
        raise PlanError(f"{where}.parallel.micro_batch_size", what, f"type {where}.parallel.micro_batch_size={max(1, each // mesh['pp'])}, or a larger batch")
    shares = {1: "device"}.get(ranks, "devices") if ranks == devices else "data-parallel ranks"
    line = f"{rows} rows = {ranks} {shares} x {micro} rows x {each // micro} accumulated"
    strategy = parallel.emitted(
        compute_dtype=stage.precision.compute_dtype,
        reduce_dtype=stage.precision.reduce_dtype,
        gradient_clipping=stage.optimizer.grad_clip,
        micro_batch_size=micro,
        accumulation=each // micro,
    )
    placement = Placement(devices=devices, mesh=mesh, micro_batch_size=micro, accumulation=each // micro, strategy=strategy)
    return dataclasses.replace(step, placement=placement, arithmetic=(*step.arithmetic, line))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, and at least 1."""
    return next((one for one in range(min(number, limit), 0, -1) if number % one == 0), 1)
