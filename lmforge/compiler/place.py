"""place: where each step runs, and how its global batch is cut into micro-batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from lmforge.errors import PlanError
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
        what = f"{rows} rows do not split over {_shares(mesh)}"
        raise PlanError(f"{where}.optimizer.global_batch_tokens", what, f"type {near}, or fewer parallel.devices")
    each = rows // ranks
    if each < mesh["pp"]:
        what = f"{each} rows of a data-parallel rank are fewer than the {mesh['pp']} stages of the pipeline"
        enough = ranks * mesh["pp"] * stage.row_tokens
        raise PlanError(f"{where}.optimizer.global_batch_tokens", what, f"type {enough}, or fewer stages")
    # A pipeline of few micro-batches stands idle for most of a step.
    most = each // mesh["pp"] if mesh["pp"] > 1 else each
    micro = parallel.micro_batch_size or largest_divisor(each, min(MICRO_BATCH_TOKENS // stage.row_tokens, most))
    if each % micro:
        above = next((one for one in range(micro, most + 1) if each % one == 0), None)
        fits = " or ".join(str(one) for one in (largest_divisor(each, min(micro, most)), above) if one)
        raise PlanError(f"{where}.parallel.micro_batch_size", f"{micro} does not divide the {each} rows a device has", f"type {fits}")
    if micro > most:
        many = "micro-batch" if each == micro else "micro-batches"
        what = f"{each // micro} {many} of {micro} rows {'is' if each == micro else 'are'} fewer than the {mesh['pp']} stages of the pipeline"
        raise PlanError(f"{where}.parallel.micro_batch_size", what, f"type {largest_divisor(each, most)}, or a larger batch")
    line = f"{rows} rows = {_shares(mesh)} x {micro} rows x {each // micro} accumulated"
    strategy = parallel.emitted(
        compute_dtype=stage.precision.compute_dtype,
        reduce_dtype=stage.precision.reduce_dtype,
        gradient_clipping=stage.optimizer.grad_clip,
        micro_batch_size=micro,
        accumulation=each // micro,
    )
    placement = Placement(devices=devices, mesh=mesh, micro_batch_size=micro, accumulation=each // micro, strategy=strategy)
    return dataclasses.replace(step, placement=placement, arithmetic=(*step.arithmetic, line))


def _shares(mesh: Mapping[str, int]) -> str:
    """What a global batch is divided over, in words."""
    ranks = data_degree(mesh)
    axes = [f"{axis} {mesh[axis]}" for axis in ("dp_replicate", "dp_shard") if mesh[axis] > 1]
    of = f" ({' x '.join(axes)})" if len(axes) > 1 else ""
    return f"{ranks} data-parallel rank{'s' if ranks > 1 else ''}{of}" if math.prod(mesh.values()) > 1 else "1 device"


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, and at least 1."""
    return next((one for one in range(min(number, limit), 0, -1) if number % one == 0), 1)
