"""cut: how a step's global batch is cut into micro-batches on its mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lmforge.errors import PlanError
from lmforge.parallel.layout import data_degree
from lmforge.plan import Step
from lmforge.stage.nodes import TrainingStage
from lmforge.step import Placement

MICRO_BATCH_TOKENS = 8192  # tokens a device takes at once, at most, where no micro_batch_size is given


@dataclass(frozen=True)
class Share:
    """What of a global batch falls to one data-parallel rank."""

    devices: int
    mesh: Mapping[str, int]
    rows: int  # of the global batch
    each: int  # rows of a rank
    most: int  # rows of a micro-batch: a pipeline wants one a stage


def share(step: Step, available: int) -> Share:
    """A rank's rows; PlanError where the batch does not split."""
    assert isinstance(step.spec, TrainingStage)
    stage, parallel = step.spec, step.spec.parallel
    devices = parallel.world(available)
    mesh = parallel.mesh(devices)
    ranks = data_degree(mesh)
    rows = (stage.optimizer.global_batch_tokens or 0) // stage.row_tokens
    where = f"stage.{step.name}.optimizer.global_batch_tokens"
    if rows % ranks:
        together = ranks * mesh["pp"]
        near = max(1, round(rows / together)) * together * stage.row_tokens
        raise PlanError(where, f"{rows} rows do not split over {_shares(mesh)}", f"type {near}, or fewer parallel.devices")
    each = rows // ranks
    if each < mesh["pp"]:
        what = f"{each} rows of a data-parallel rank are fewer than the {mesh['pp']} stages of the pipeline"
        raise PlanError(where, what, f"type {ranks * mesh['pp'] * stage.row_tokens}, or fewer stages")
    # A pipeline of few micro-batches stands idle for most of a step.
    return Share(devices, mesh, rows, each, each // mesh["pp"] if mesh["pp"] > 1 else each)


def micro_batches(step: Step, available: int) -> list[int]:
    """The rows that a micro-batch may have where none are typed, the most first."""
    assert isinstance(step.spec, TrainingStage)
    found = share(step, available)
    limit = max(1, min(MICRO_BATCH_TOKENS // step.spec.row_tokens, found.most))
    return [one for one in range(limit, 0, -1) if found.each % one == 0]


def placed(step: Step, available: int) -> Step:
    """The step with its placement; micro-batches of as many rows as may be where none are typed."""
    assert isinstance(step.spec, TrainingStage)
    stage, parallel, found = step.spec, step.spec.parallel, share(step, available)
    each, most = found.each, found.most
    where = f"stage.{step.name}.parallel.micro_batch_size"
    micro = parallel.micro_batch_size or micro_batches(step, available)[0]
    if each % micro:
        above = next((one for one in range(micro, most + 1) if each % one == 0), None)
        fits = " or ".join(str(one) for one in (largest_divisor(each, min(micro, most)), above) if one)
        raise PlanError(where, f"{micro} does not divide the {each} rows a device has", f"type {fits}")
    if micro > most:
        many = "micro-batch" if each == micro else "micro-batches"
        stages = found.mesh["pp"]
        what = f"{each // micro} {many} of {micro} rows {'is' if each == micro else 'are'} fewer than the {stages} stages of the pipeline"
        raise PlanError(where, what, f"type {largest_divisor(each, most)}, or a larger batch")
    line = f"{found.rows} rows = {_shares(found.mesh)} x {micro} rows x {each // micro} accumulated"
    strategy = parallel.emitted(
        compute_dtype=stage.precision.compute_dtype,
        reduce_dtype=stage.precision.reduce_dtype,
        gradient_clipping=stage.optimizer.grad_clip,
        micro_batch_size=micro,
        accumulation=each // micro,
    )
    placement = Placement(devices=found.devices, mesh=found.mesh, micro_batch_size=micro, accumulation=each // micro, strategy=strategy)
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
