"""Seconds of the optimizer's update on one rank, and of what lies in host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from lmforge.predict.job import Job
from lmforge.predict.rates import Rates

HOST_BANDWIDTH = 20e9  # bytes/s of a rank's update in host memory, an assumption: two sockets of 8 x DDR4-3200 are 410 GB/s, for 8 ranks, of which 40 %
CLIPPED = 3  # elements moved to clip a gradient: read for the norm, read and written to scale


class _Held(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def count(self) -> int: ...


def held(job: Job) -> Iterator[tuple[_Held, float]]:
    """What this rank updates, and its share of it: tensor by tensor on a mesh, a part of one flat buffer under DeepSpeed."""
    if job.stage.parallel.flat:
        share = 1 / job.stage.parallel.shard_degree("optimizer", job.placement.devices)
        yield from ((one, share) for one in job.load.trained)
        return
    at = max(job.cut.first_ranks(), key=lambda at: sum(one.numel for one in job.cut.held_at(job.load.trained, at)))
    yield from ((one, 1.0) for one in job.cut.held_at(job.load.trained, at))


def update_bytes(job: Job) -> float:
    """A fused update reads weight, gradient and states, and writes weight and states: 28 bytes an element of AdamW in float32, plus 12 to clip it."""
    optimizer, width = job.stage.optimizer, job.stage.precision.param_bytes
    moves = 3 + (CLIPPED if optimizer.grad_clip else 0)
    return sum(share * one.count * (2 * optimizer.state_bytes(one.shape, one.name, width) + moves * width * math.prod(one.shape)) for one, share in held(job))


def update(job: Job, rates: Rates) -> float:
    """Bytes, and the products of an optimizer that has any (Muon's Newton-Schulz iterations)."""
    optimizer = job.stage.optimizer
    products = sum(share * one.count * optimizer.update_flops(one.shape, one.name) for one, share in held(job))
    moved = 0.0 if job.stage.parallel.offloads("optimizer") else update_bytes(job) / rates.update
    return moved + products / rates.matmul


def offloaded(job: Job, rates: Rates) -> float:
    """Gradients to the host and weights back, float32, and the update at the host's speed; offloaded weights cross the link for every gather too."""
    parallel = job.stage.parallel
    if not parallel.offloads("optimizer") and not parallel.offloads("params"):
        return 0.0
    assert rates.host is not None
    elements = sum(share * one.count * math.prod(one.shape) for one, share in held(job))
    width, found = job.stage.precision.param_bytes, 0.0
    if parallel.offloads("optimizer"):
        found += 2 * width * elements / rates.host.bandwidth + update_bytes(job) / HOST_BANDWIDTH
    if parallel.offloads("params"):
        found += 2 * job.accumulation * width * elements / rates.host.bandwidth
    return found
