"""What one rank's kernels and links get of a machine: datasheet times prior factors, or what `lmforge calibrate` measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lmforge.hardware.calibration import Calibration
from lmforge.hardware.nodes import Link, Machine

PROLOGUE = 64.0  # of K, that a GPU's tile costs beyond its products (fitted with llm-foundry's A100 rows; see kernels.product)
BACKWARD = 0.75  # attention's rate of backward over that of forward: 0.7-0.85 in Dao 2023 (arXiv 2307.08691), figures 4 and 5
MASKED = 0.75  # an assumption: torch's memory-efficient kernel under a mask, over flash's rate


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one rank, for one dtype of matrix products. Links are those of a device (within, host) and of a whole node (between), as large messages see them."""

    gpu: bool
    units: int | None
    matmul: float  # FLOP/s, long K and full waves
    prologue: float
    attention: float  # FLOP/s forward, causal
    attention_backward: float  # times that
    masked: float  # FLOP/s forward under a mask
    masked_backward: float
    memory: float  # bytes/s
    update: float  # bytes/s of the optimizer
    launch: float  # seconds a kernel
    step: float  # seconds a step beside all kernels
    loader: float  # tokens/s of a process
    exposed: float
    residual: float  # times attention, elementwise kernels and launches
    within: Link | None
    between: Link | None
    host: Link | None
    devices_per_node: int
    measured: bool


def lacks(machine: Machine, dtype: str, devices: int) -> tuple[str, ...]:
    """What has to be known for a time and is not, as keys; empty where a time can be estimated."""
    return tuple(_lacking(machine, dtype, devices))


def _lacking(machine: Machine, dtype: str, devices: int) -> Iterator[str]:
    known = machine.calibration
    if known is None or dtype not in known.matmul:
        if machine.peak_flops.of(dtype) is None:
            stated = ", ".join(machine.peak_flops.known) or "none"
            yield f"hardware.peak_flops.{dtype} (known: {stated})"
        if machine.memory_bandwidth is None:
            yield "hardware.memory_bandwidth"
        if machine.accelerator == "cuda" and machine.units is None:
            yield "hardware.units"
    if devices > 1 and machine.links.within is None and (known is None or known.bandwidth is None) and machine.devices_per_node > 1:
        yield "hardware.links.within"
    if devices > machine.devices_per_node and machine.links.between is None:
        yield "hardware.links.between"


def rates(machine: Machine, dtype: str, devices: int) -> Rates:
    """Of each of `devices` ranks; nothing that `lacks` names may be missing."""
    known = machine.calibration
    return _measured(machine, known, dtype, devices) if known is not None and dtype in known.matmul else _prior(machine, dtype, devices)


def _prior(machine: Machine, dtype: str, devices: int) -> Rates:
    peak, factors, gpu = machine.peak_flops.of(dtype), machine.factors, machine.accelerator == "cuda"
    assert peak is not None
    assert machine.memory_bandwidth is not None
    here = min(devices, machine.devices_per_node)
    cores = 1 if gpu else max(1, machine.devices_per_node // here)  # a process takes the cores that other ranks leave it
    memory = machine.memory_bandwidth * factors.memory / (1 if gpu else here)
    attention = peak * cores * factors.attention
    return Rates(
        gpu=gpu,
        units=machine.units,
        matmul=peak * cores * factors.matmul,
        prologue=PROLOGUE if gpu else 0.0,
        attention=attention,
        attention_backward=BACKWARD,
        masked=attention * MASKED if gpu else attention,
        masked_backward=BACKWARD,
        memory=memory,
        update=memory,
        launch=factors.launch,
        step=0.0,
        loader=factors.loader,
        exposed=factors.exposed,
        residual=1.0,
        within=_got(machine.links.within, factors.link),
        between=_got(machine.links.between, factors.link),
        host=_got(machine.links.host, factors.link),
        devices_per_node=machine.devices_per_node,
        measured=False,
    )


def _measured(machine: Machine, known: Calibration, dtype: str, devices: int) -> Rates:
    gpu, here = machine.accelerator == "cuda", min(devices, machine.devices_per_node)
    # Ranks on a host share what one process with all its threads got.
    share = (1.0 if gpu else min(1.0, machine.devices_per_node / here / known.threads)) / known.learned
    attention, factors = known.attention[dtype], machine.factors
    link = Link(bandwidth=known.bandwidth, latency=known.latency or 0.0) if known.bandwidth else None
    return Rates(
        gpu=gpu,
        units=known.units,
        matmul=known.matmul[dtype] * share,
        prologue=PROLOGUE if gpu else 0.0,
        attention=attention.causal * share,
        attention_backward=attention.causal_backward,
        masked=attention.masked * share,
        masked_backward=attention.masked_backward,
        memory=known.memory * share,
        update=known.update * share,
        launch=known.launch * known.learned,
        step=known.step * known.learned,
        loader=known.loader,
        exposed=factors.exposed,
        residual=known.residual,
        within=link or _got(machine.links.within, factors.link),
        between=_got(machine.links.between, factors.link),
        host=_got(machine.links.host, factors.link),
        devices_per_node=machine.devices_per_node,
        measured=True,
    )


def _got(link: Link | None, factor: float) -> Link | None:
    return Link(bandwidth=link.bandwidth * factor, latency=link.latency) if link else None
