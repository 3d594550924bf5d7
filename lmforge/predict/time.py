"""Seconds of an optimizer step on the slowest rank, by part, with a band: kernels, links, bubble, update, loader and rollouts added up.

What hides behind what: sharded and replicated data parallel run beside compute (`links.beside`); tensor parallel and pipelines make compute wait; a data
loader with workers reads ahead. Formulas and their sources are with the functions of flops, kernels, layers, links and generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmforge.hardware.nodes import Machine
from lmforge.parallel.layout import data_degree, stages
from lmforge.predict import demand
from lmforge.predict.generation import gathering, rollout
from lmforge.predict.job import Job
from lmforge.predict.layers import micro_batch, total
from lmforge.predict.links import beside, collective, group
from lmforge.predict.rates import Rates, lacks, rates
from lmforge.predict.update import offloaded, update
from lmforge.stage.workload import Pass, Workload

# Measured over predicted seconds. Of 240 published rows over the prior the median is 1.01 and 95 % are within the first; of llm-foundry's own rows, left
# out of a fit one by one, 80 % are within the second (benchmarks/time.py).
PRIOR, CALIBRATED = (0.85, 1.40), (0.93, 1.08)
# Parts that no table was found for, so that calibrating kernels does not narrow them: decoding is bound by the host, offloading by the host's memory.
UNCHECKED = {"rollout": (0.5, 2.0), "offload": (0.5, 2.0), "tensor": (0.8, 1.5), "loader": (0.5, 2.0)}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One optimizer step. MFU counts the model's FLOPs by 6N + 6LdT (4N + 6LdT under an adapter), HFU those that are computed; both over `peak_flops`."""

    parts: Mapping[str, float]  # seconds; those that are 0 are left out
    low: float
    high: float
    tokens: int  # of the global batch
    devices: int  # that are taken: on a CPU all cores, whatever the ranks
    model_flops: float  # of all devices
    hardware_flops: float
    peak_flops: float | None  # of all devices together; None is not known, and then there is no utilization
    measured: bool  # from a calibration

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float | None:
        return self.model_flops / self.total / self.peak_flops if self.peak_flops else None

    @property
    def hfu(self) -> float | None:
        return self.hardware_flops / self.total / self.peak_flops if self.peak_flops else None


def missing(job: Job, machine: Machine) -> tuple[str, ...]:
    """The keys of `hardware` that a time of this job needs and that are null; empty where `seconds` can be asked."""
    offloads = job.stage.parallel.offloads("optimizer") or job.stage.parallel.offloads("params")
    found = lacks(machine, job.stage.precision.compute_dtype, job.placement.devices)
    return (*found, *(["hardware.links.host"] if offloads and machine.links.host is None else []))


def seconds(job: Job, machine: Machine, workload: Workload | None = None) -> StepTime | None:
    """The time of one optimizer step; None where `missing` names what is not known of the machine."""
    if missing(job, machine):
        return None
    work = workload or job.workload
    found = rates(machine, job.stage.precision.compute_dtype, job.placement.devices)
    parts = {name: value for name, value in _parts(job, work, found).items() if value > 0}
    low, high = _band(parts, found.measured)
    ranks = data_degree(job.mesh)
    peak = machine.peak_flops.of(job.stage.precision.compute_dtype)
    return StepTime(
        parts=parts,
        low=low,
        high=high,
        tokens=job.rows * job.accumulation * ranks * job.stage.row_tokens,
        devices=job.placement.devices if found.gpu else machine.devices,
        model_flops=ranks * demand.model_flops(job, work),
        hardware_flops=ranks * demand.hardware_flops(job, work),
        peak_flops=peak * (job.placement.devices if found.gpu else machine.devices) if peak else None,
        measured=found.measured,
    )


def _parts(job: Job, work: Workload, found: Rates) -> dict[str, float]:
    parts = _compute(job, work, found)
    busy = sum(parts.values())
    parts |= _traffic(job, busy, work.accumulation, found)
    parts["optimizer"] = update(job, found)
    parts["offload"] = offloaded(job, found)
    parts["loop"] = found.step
    if work.before:
        parts["scoring"] = sum(one.times * _scored(job, one, found) for one in work.before)
    if work.rollout:
        parts["rollout"] = rollout(job, work.rollout, found)
    else:
        parts["loader"] = loader(job, sum(parts.values()), found)
    return parts


def _compute(job: Job, work: Workload, found: Rates) -> dict[str, float]:
    """The fullest pipeline stage's micro-batches one after the other, and the bubble.

    A micro-batch goes through all stages, and every one after the first takes as long as the slowest: sum(t) + (m - 1) max(t). Of equal stages that is
    (m + p - 1) t, so the bubble is (p - 1)/(m + p - 1) of the step (Narayanan et al. 2021, section 2.2), for gpipe and 1f1b alike.
    """
    sizes = stages(job.shape.layers, job.mesh["pp"]) if job.mesh["pp"] > 1 else [range(job.shape.layers)]
    each = []
    for index, layers in enumerate(sizes):
        last = index == len(sizes) - 1
        each.append(total((_of_pass(job, one, found, layers=len(layers), last=last), one.times) for one in work.passes))
    taken = [sum(parts.values()) for parts in each]
    slowest = taken.index(max(taken))
    parts = {name: value * work.accumulation for name, value in each[slowest].items()}
    return parts | {"bubble": bubble(taken, 1)}


def bubble(taken: Iterable[float], interleave: int) -> float:
    """Idle time of the slowest of a pipeline's stages in a step, from each stage's time for a micro-batch.

    `interleave` chunks of layers a device make it so many times shorter (Narayanan et al. 2021, section 2.2).
    """
    listed = list(taken)
    return (sum(listed) - max(listed)) / interleave


def _of_pass(job: Job, one: Pass, found: Rates, *, layers: int | None = None, last: bool = True) -> dict[str, float]:
    """One pass over one micro-batch: layers, output layer, and what an adapter or a precision adds."""
    run = demand.run(job, one)
    head = run.rows * demand.head_length(one) if last else 0.0
    parts = micro_batch(job.shape, run, found, layers=layers or job.shape.layers, head_tokens=head)
    share = (layers or job.shape.layers) / job.shape.layers
    extra = demand.extras(job, one, run, found)
    return total([(parts, 1.0), (extra, share)])


def _scored(job: Job, one: Pass, found: Rates) -> float:
    """A pass without gradients before the step's own; models that are trained are gathered for it, those beside them are whole on every device."""
    taken = sum(_of_pass(job, one, found).values())
    return taken + (gathering(job, taken, found) if one.model in ("trained", "value") else 0.0)


def _traffic(job: Job, busy: float, accumulation: int, found: Rates) -> dict[str, float]:
    """Exposed seconds of what ranks send each other. Copies (DDP, HSDP) are summed in the last micro-batch's backward, and can hide there only."""
    sent = job.stage.parallel.sent(job.cut, demand.moved(job))
    beside_all = beside_last = 0.0
    parts = dict.fromkeys(("communication", "tensor", "send"), 0.0)
    for one in sent:
        if job.mesh[one.axis] == 1:
            continue
        taken = collective(one.kind, one.size, one.messages, group(one.axis, job.mesh, found))
        if one.waits:
            parts[{"tp": "tensor", "pp": "send"}.get(one.axis, "communication")] += taken
        elif one.axis == "dp_replicate":
            beside_last += taken
        else:
            beside_all += taken
    parts["communication"] += beside(beside_all, busy, found.exposed) + beside(beside_last, busy / accumulation * 2 / 3, found.exposed)
    return parts


def loader(job: Job, step: float, found: Rates) -> float:
    """Reading a rank's rows: all of it where the process reads itself, else what its workers do not manage during a step."""
    taken = job.rows * job.accumulation * job.stage.row_tokens / found.loader
    workers = job.stage.parallel.data_workers
    return max(0.0, taken / workers - step) if workers else taken


def _band(parts: Mapping[str, float], measured: bool) -> tuple[float, float]:
    ends = CALIBRATED if measured else PRIOR
    low, high = (sum(value * UNCHECKED.get(name, ends)[end] for name, value in parts.items()) for end in (0, 1))
    return low, high
