"""Bytes that a step finds and leaves: weights, gradients and optimizer states of the fullest device, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmforge.hardware.nodes import Accelerator
from lmforge.parallel.nodes import Part
from lmforge.predict.job import Job
from lmforge.stage.base import parameters


@dataclass(frozen=True, kw_only=True)
class Static:
    """Bytes on one device. What a GPU offloads lies in host memory and counts nothing here."""

    stage: int  # of the pipeline
    params: int  # that are trained
    grads: int  # as an update finds them
    optimizer: int
    base: int  # frozen weights under an adapter
    beside: int  # models without gradients, whole on every device

    @property
    def total(self) -> int:
        return self.params + self.grads + self.optimizer + self.base + self.beside


def held(job: Job, accelerator: Accelerator) -> list[Static]:
    """What the first rank of each pipeline stage holds: as much as any of its stage. A CPU's device is its host, so that offloading frees nothing there."""
    found = [_flat(job)] if job.stage.parallel.flat else list(_meshed(job))
    return [_without_offloaded(job, one) for one in found] if accelerator == "cuda" else found


def fullest(job: Job, accelerator: Accelerator) -> Static:
    """The device that holds most."""
    return max(held(job, accelerator), key=lambda one: one.total)


def offloaded(job: Job) -> int:
    """Bytes that a GPU's state takes in its host's memory."""
    return max(one.total for one in held(job, "cpu")) - max(one.total for one in held(job, "cuda"))


def _flat(job: Job) -> Static:
    """Where all tensors are one buffer that is split as the parallel option says (ZeRO); each share is rounded up."""
    stage, load, devices, width = job.stage, job.load, job.placement.devices, job.stage.precision.param_bytes
    trained = parameters(load.trained) * width
    states = sum(stage.optimizer.state_bytes(one.shape, one.name, width) * one.count for one in load.trained)
    amounts: Mapping[Part, int] = {"params": trained + stage.base_bytes(job.weights), "grads": trained, "optimizer": states}
    here = {part: -(-amount // stage.parallel.shard_degree(part, devices)) for part, amount in amounts.items()}
    base = here["params"] * stage.base_bytes(job.weights) // amounts["params"]
    return _on_device(job, 0, here["params"] - base, here["grads"], here["optimizer"], base)


def _meshed(job: Job) -> Iterator[Static]:
    """Tensor by tensor, as `Cut` says who holds what."""
    stage, load, cut, width = job.stage, job.load, job.cut, job.stage.precision.param_bytes
    for at in cut.first_ranks():
        mine = cut.held_at(load.trained, at)
        trained = sum(one.numel for one in mine) * width
        gradients = sum(one.numel for one in cut.gradients_at(load.trained, at)) * width
        states = sum(stage.optimizer.state_bytes(one.shape, one.name, width) * one.count for one in mine)
        yield _on_device(job, at["pp"], trained, gradients, states, _base(job, at))


def _base(job: Job, at: Mapping[str, int]) -> int:
    """Bytes of the base under an adapter on one rank. A quantized one has scales beside its codes, so its share is that of all its bytes."""
    width, base = job.stage.precision.param_bytes, job.load.base
    here, whole = sum(one.numel for one in job.cut.held_at(base, at)) * width, parameters(base) * width
    kept = job.stage.base_bytes(job.weights)
    return here if kept == whole else -(-kept // job.mesh["dp_shard"])


def _without_offloaded(job: Job, one: Static) -> Static:
    """What stays on the device where parts lie in host memory."""
    offloads = job.stage.parallel.offloads
    return dataclasses.replace(
        one,
        params=0 if offloads("params") else one.params,
        grads=0 if offloads("grads") else one.grads,
        optimizer=0 if offloads("optimizer") else one.optimizer,
        base=0 if offloads("params") else one.base,
    )


def _on_device(job: Job, stage: int, params: int, grads: int, optimizer: int, base: int) -> Static:
    """With the models beside the trained one."""
    return Static(
        stage=stage,
        params=params,
        grads=grads,
        optimizer=optimizer,
        base=base,
        beside=parameters(job.load.frozen) * job.stage.precision.param_bytes,
    )
