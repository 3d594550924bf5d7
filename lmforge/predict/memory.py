"""Peak bytes of a training step on its fullest device, part by part, from shapes, placement and machine alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmforge.hardware.nodes import Machine
from lmforge.parallel.layout import stages
from lmforge.predict import static
from lmforge.predict.answers import drawing, held_out
from lmforge.predict.around import around
from lmforge.predict.constants import constants, reserve
from lmforge.predict.job import Job
from lmforge.predict.moments import Graph, Moment, Parts, plus
from lmforge.predict.passes import Passed, kept, passed, seen
from lmforge.predict.static import Static
from lmforge.predict.tensors.heads import CHUNK_BYTES
from lmforge.predict.updates import temporaries

PARTS = ("params", "grads", "optimizer", "base", "activations", "logits", "buffers", "beside", "cache", "reserve")

HELD_OUT = "held-out answers compared"  # after the last step


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes at the fullest moment of the fullest device; `parts` has every one of PARTS."""

    parts: Mapping[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """Without what the framework takes besides tensors: what torch's allocator counts as allocated."""
        return self.total - self.parts["reserve"]


def peak(job: Job, machine: Machine) -> Peak | None:
    """The fullest moment of a step; None where nobody has followed the model's operations (`passes.seen`)."""
    return max(peaks(job, machine), key=lambda one: one.total, default=None)


def peaks(job: Job, machine: Machine) -> Iterator[Peak]:
    """Every moment of a step that may be its fullest, on every stage of a pipeline."""
    if not seen(job):
        return
    outside = {"reserve": reserve(machine, job.placement.devices), "activations": constants(job)}
    for held in static.held(job, machine.accelerator):
        there = plus(dict.fromkeys(PARTS, 0), outside, _at_rest(held))
        for name, parts in moments(job, machine, held):
            yield Peak(parts=plus(there, parts), moment=name)


def _at_rest(held: Static) -> Parts:
    return {"params": held.params, "optimizer": held.optimizer, "base": held.base, "beside": held.beside}


def moments(job: Job, machine: Machine, held: Static) -> Iterator[Moment]:
    """All of a step that may be its fullest, above what is at rest."""
    there = {"grads": held.grads if kept(job) else 0}
    for below, graphs in _graphs(job, machine, held):
        for name, parts in _through(graphs):
            yield name, plus(below, parts)
    buffers = {"buffers": around(job, held, machine.accelerator).always}
    yield "update", plus({"grads": held.grads, "activations": temporaries(job, held)}, buffers)
    if job.workload.rollout is not None:
        for name, parts in drawing(job, job.workload.rollout, machine.accelerator):
            yield name, plus(there, parts, buffers)
        yield HELD_OUT, {**held_out(job, job.workload.rollout), "optimizer": -held.optimizer}


def _through(graphs: list[Graph]) -> Iterator[Moment]:
    """Forward through one network after the other, backward in reverse: the engine runs what was made last first."""
    below: Parts = {}
    for graph in graphs:
        for name, parts in graph.forward():
            yield name, plus(below, parts)
        below = plus(below, graph.saved())
    grads: Parts = {}
    for number in range(len(graphs) - 1, -1, -1):
        below = plus(*(graph.saved() for graph in graphs[:number]))
        for name, parts in graphs[number].backward():
            yield name, plus(below, grads, parts)
        grads = plus(grads, {"grads": graphs[number].left()})


def _graphs(job: Job, machine: Machine, held: Static) -> Iterator[tuple[Parts, list[Graph]]]:
    """What lies below a micro-batch's networks, and those; one for each way its rows may lie."""
    ways = [list(passed(job, one, machine.accelerator)) for one in job.workload.passes]
    there = {"grads": held.grads if kept(job) else 0}
    for number in range(max(map(len, ways))):
        chosen = [way[min(number, len(way) - 1)] for way in ways]
        graphs = [_graph(job, machine, held, one, index) for index, one in enumerate(chosen)]
        batch = {"activations": chosen[0].batch * job.accumulation}
        if job.mesh["pp"] == 1:
            yield plus(there, batch), graphs
        else:
            yield from ((plus(batch, below), [graph]) for below, graph in _pipelined(job, held, graphs[0], chosen[0]))


def _graph(job: Job, machine: Machine, held: Static, one: Passed, number: int) -> Graph:
    """A network as its stage of the pipeline has it."""
    shape, count = job.shape, job.mesh["pp"]
    trained, soft = not one.run.frozen, bool(job.stage.positions)
    first, last = held.stage == 0, held.stage == count - 1
    return Graph(
        shape=shape,
        run=one.run,
        around=around(job, held, machine.accelerator, number),
        layers=len(stages(shape.layers, count)[held.stage]),
        predicted=one.predicted,
        scalar=one.scalar,
        chunk_bytes=CHUNK_BYTES[machine.accelerator],
        input_grad=trained or soft or not first,
        table=_table(job, one) if trained and first else 0,
        tied=shape.tied and not one.scalar,
        headed=last,
        entropy=one.entropy,
        picked=job.workload.rollout is not None and not one.scalar,
    )


def _table(job: Job, one: Passed) -> int:
    """Bytes of the embedding's gradient as backward makes it: whole on every rank of tp."""
    return job.shape.vocab * job.shape.hidden * one.run.param


def _pipelined(job: Job, held: Static, graph: Graph, one: Passed) -> Iterator[tuple[Parts, Graph]]:
    """What a stage of a pipeline holds of its other micro-batches, and the one that runs (torch.distributed.pipelining).

    GPipe has all in flight (Huang et al. 2019), 1F1B as many as there are stages from here on (Narayanan et al. 2019). Where that is all of them, no gradient
    is there while all are. Buffers to receive each one's input and gradient stay from the first step on; ids, positions and labels are there once more.
    """
    count, micro_batches = job.mesh["pp"], job.accumulation
    flying = micro_batches if getattr(job.stage.parallel, "pp_schedule", "1f1b") == "gpipe" else min(micro_batches, count - held.stage)
    received = (micro_batches - 1) * ((held.stage > 0) + (held.stage < count - 1)) * graph.hidden
    always = {"buffers": received, "activations": one.batch * micro_batches}
    other = graph.saved()
    if held.stage > 0:  # a layer's input is a buffer that has been counted
        other = plus(other, {"activations": -graph.hidden})

    def of(others: int, grads: int) -> Parts:
        return plus(always, {"grads": grads}, {name: others * size for name, size in other.items()})

    later = flying - 1 if flying < micro_batches else flying - 2
    if flying == micro_batches:
        fresh = dataclasses.replace(graph, run=dataclasses.replace(graph.run, accumulated=False))
        yield of(flying - 1, 0), fresh
    if micro_batches > 1:
        yield of(max(0, later), held.grads), graph
