"""The ways that parallel=auto may choose from, as data: meshes, sharding, micro-batches, checkpointing and offload, in the order in which they cost more."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lmforge.parallel.nodes import CHECKPOINTING, Auto, Checkpointing

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Candidate:
    """One way of running a step."""

    devices: int
    pp: int
    tp: int
    dp_replicate: int
    dp_shard: int
    reshard: bool
    checkpointing: Checkpointing
    offload: bool
    rows: int  # of a micro-batch
    accumulation: int

    @property
    def plain(self) -> bool:
        """Whether every device holds the whole model: one device, or DDP."""
        return self.pp == self.tp == self.dp_shard == 1

    @property
    def kind(self) -> Key:
        """All but the rows, of which more never need less. One micro-batch a step is a kind of its own: no gradients are there before its backward."""
        mesh = (self.devices, self.pp, self.tp, self.dp_replicate, self.dp_shard)
        return (*mesh, self.reshard, self.checkpointing, self.offload, self.accumulation == 1)

    @property
    def way(self) -> Key:
        """What makes it another answer for a person: only the best sharding and rows of each are told."""
        return (self.devices, self.pp, self.tp, self.dp_shard > 1, self.dp_replicate > 1 and self.dp_shard > 1, self.offload, self.checkpointing)


@dataclass(frozen=True)
class Space:
    """What there is to search for a step: `auto` has the keys that are typed, and null for those that are not."""

    auto: Auto
    counts: tuple[int, ...]  # of devices, the preferred first
    per_node: int
    rows: int  # of the global batch
    layers: int

    def order(self, one: Candidate) -> Key:
        """Of two that take the same time, or whose times are not known: no offload, then fewest communication (no pipeline, no tensor parallel, copies before
        shards before both), then least computed again, then gathered weights kept, then most rows."""
        sharing = 0 if one.dp_shard == 1 else 1 if one.dp_replicate == 1 else 2
        again = CHECKPOINTING.index(one.checkpointing)
        return (self.counts.index(one.devices), one.offload, one.pp, one.tp, sharing, again, one.reshard, one.dp_replicate, -one.rows)

    def meshes(self, devices: int) -> Iterator[Candidate]:
        """Each mesh of so many devices, in its cheapest form with fewest rows. Tensor parallel stays in a node and stages of a pipeline are equal, unless they
        are typed otherwise: uneven stages wait for the fullest."""
        for pp in self._sizes(self.auto.pp, devices, lambda size: self.layers % size == 0):
            for tp in self._sizes(self.auto.tp, devices // pp, lambda size: size <= self.per_node):
                ranks = devices // pp // tp
                for shard in self._sizes(self.auto.dp_shard, ranks, lambda size: True):
                    if self.auto.dp_replicate in (None, ranks // shard):
                        yield self._cheapest(devices, pp, tp, ranks // shard, shard)

    def _sizes(self, typed: int | None, devices: int, fits: Callable[[int], bool]) -> list[int]:
        return [one for one in divisors(devices) if (one == typed if typed else fits(one))]

    def _cheapest(self, devices: int, pp: int, tp: int, replicate: int, shard: int) -> Candidate:
        first = Candidate(devices, pp, tp, replicate, shard, True, "none", False, 1, 1)
        rows = self.auto.micro_batch_size or 1
        chosen = {"reshard": self._reshards(first)[0], "checkpointing": self._checkpointings()[0], "offload": self._offloads(first)[0]}
        return dataclasses.replace(first, **chosen, rows=rows, accumulation=max(1, self.rows // replicate // shard // rows))  # type: ignore[arg-type]

    def _reshards(self, one: Candidate) -> tuple[bool, ...]:
        typed = self.auto.reshard_after_forward
        if one.dp_shard == 1:
            return (True if typed is None else typed,)
        return (False, True) if typed is None else (typed,)

    def _checkpointings(self) -> tuple[Checkpointing, ...]:
        typed = self.auto.activation_checkpointing
        return CHECKPOINTING if typed is None else (typed,)

    def _offloads(self, one: Candidate) -> tuple[bool, ...]:
        """Nothing is offloaded by a strategy that shards nothing; where it is typed there, the mesh is refused."""
        typed = self.auto.cpu_offload
        return (typed,) if typed is not None else (False,) if one.plain else (False, True)

    def micro_batches(self, one: Candidate) -> Iterator[Candidate]:
        """The mesh with each size of micro-batch: about powers of two that divide a rank's rows and leave a pipeline one a stage."""
        each = self.rows // one.dp_replicate // one.dp_shard
        typed = self.auto.micro_batch_size
        for rows in [typed] if typed else _sizes_of(each, each // one.pp):
            yield dataclasses.replace(one, rows=rows, accumulation=each // rows)

    def after(self, one: Candidate) -> Iterator[Candidate]:
        """What saves memory and takes no less time, one step further; every combination comes from one other only."""
        reshards, again, offloads = self._reshards(one), self._checkpointings(), self._offloads(one)
        kept = one.offload == offloads[0]
        if kept and one.checkpointing == again[0] and one.reshard != reshards[-1]:
            yield dataclasses.replace(one, reshard=reshards[-1])
        if kept and one.checkpointing != again[-1]:
            yield dataclasses.replace(one, checkpointing=again[again.index(one.checkpointing) + 1])
        if one.offload != offloads[-1]:
            yield dataclasses.replace(one, offload=True)

    def least(self, one: Candidate) -> Candidate:
        """What needs least of all with its pipeline, tensor parallel and checkpointing: sharded over all ranks if at all, offloaded, fewest rows."""
        alike = (each for each in self.micro_batches(one) if each.kind == one.kind)
        fewest = min(alike, key=lambda each: each.rows)
        if one.dp_shard > 1 and self.auto.dp_shard is None and self.auto.dp_replicate is None:
            fewest = dataclasses.replace(fewest, dp_replicate=1, dp_shard=one.dp_replicate * one.dp_shard)
        return dataclasses.replace(fewest, reshard=self._reshards(one)[-1], offload=self._offloads(one)[-1])


@functools.lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All of a number, the least first."""
    low = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return tuple(low + [number // one for one in reversed(low) if one * one != number])


@functools.lru_cache(maxsize=1024)
def _sizes_of(each: int, most: int) -> tuple[int, ...]:
    """The largest divisors of a rank's rows up to each power of two, and up to the most that there may be."""
    fitting = [size for size in divisors(each) if size <= most]
    limits = [*(2**power for power in range(most.bit_length())), most]
    return tuple(sorted({max(size for size in fitting if size <= limit) for limit in limits}))
