"""auto: `parallel=auto` becomes the fastest way that fits, as if it had been typed; its arithmetic says what else there was, and why it lost.

A choice is one that the other rules take: `capability` and `cut` are asked of every mesh. It uses all devices that rows can be split over, or one. DeepSpeed
is not searched: FSDP2 and its CPU offload hold the same. Where the machine's figures are null there are no times, and `Space.order` decides alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lmforge.codec import decode
from lmforge.compiler import capability
from lmforge.compiler.candidates import Candidate, Space
from lmforge.compiler.cut import placed
from lmforge.compiler.larger import whole
from lmforge.compiler.machine import machine_of
from lmforge.compiler.reasons import lines, refusal
from lmforge.compiler.search import Ranking, Search
from lmforge.compiler.verdict import Verdict, needs
from lmforge.compose.catalog import Catalog
from lmforge.errors import LmforgeError, PlanError, Problem
from lmforge.hardware.nodes import Hardware, Machine
from lmforge.model.weights import sizes
from lmforge.parallel.nodes import DDP, Auto, Mesh, Parallel, Single
from lmforge.plan import Plan, Step
from lmforge.predict.job import Job
from lmforge.predict.time import StepTime, missing, seconds
from lmforge.registry import lookup
from lmforge.stage.base import TrainingStage


def auto(plan: Plan) -> Plan:
    """The plan with a choice for each step that leaves it open; PlanError for each that nothing fits."""
    config, machine = plan.experiment.model.config(), machine_of(plan)
    alone = sum(isinstance(step.spec, TrainingStage) for step in plan.steps) == 1
    problems: list[Problem] = []
    steps = []
    for step in plan.steps:
        if isinstance(step.spec, TrainingStage) and isinstance(step.spec.parallel, Auto):
            found = chosen(Open(step, config, machine, "parallel" if alone else f"stage.{step.name}.parallel"))
            step, said = (step, found) if isinstance(found, Problem) else (found, None)
            problems += [said] if said else []
        steps.append(step)
    if problems:
        raise PlanError.of(problems)
    return dataclasses.replace(plan, steps=tuple(steps))


def chosen(open_: Open) -> Step | Problem:
    """The step with the choice written into it, or what the least of it needs."""
    ranking = open_.ranking()
    if not ranking.best:
        return refusal(open_, ranking, fits_on(open_))
    best = open_.typed(ranking.best[0])
    return dataclasses.replace(open_.step, spec=best.spec, arithmetic=(*open_.step.arithmetic, *lines(open_, ranking)))


class Open:
    """A step whose parallel option is open, on a machine; `prefix` is how its keys are typed."""

    def __init__(self, step: Step, config: Mapping[str, Any], machine: Machine, prefix: str) -> None:
        assert isinstance(step.spec, TrainingStage)
        assert isinstance(step.spec.parallel, Auto)
        self.step, self.config, self.machine, self.prefix = step, config, machine, prefix
        self.stage, self.auto = step.spec, step.spec.parallel
        self.times: dict[Candidate, StepTime | None] = {}
        self.verdicts: dict[Candidate, Verdict] = {}
        rows = (self.stage.optimizer.global_batch_tokens or 0) // self.stage.row_tokens
        self.space = Space(self.auto, (), machine.devices_per_node, rows, sizes(config).num_hidden_layers)
        self.meshes = self._meshes()
        # On a CPU one process has all cores, so one is simpler; idle GPUs are not.
        counts = sorted(self.meshes, reverse=machine.accelerator == "cuda")
        self.space = dataclasses.replace(self.space, counts=tuple(counts))
        most = max(counts)
        self.idle = "" if most == (self.auto.devices or machine.devices) else f"{most:,} of {machine.devices:,} devices: no mesh of more takes {rows:,} rows"
        self.unknown = tuple(dict.fromkeys(key for found in self.meshes.values() for key in missing(self.job(found[0]), machine)))

    def ranking(self, keep: int | None = None, timed: bool = True) -> Ranking:
        """What the search finds."""
        search = Search(self.space, self._seconds if timed and not self.unknown else lambda one: 0.0, lambda one: self.verdict(one).need, self._room)
        roots = (one for found in self.meshes.values() for mesh in found for one in self.space.micro_batches(mesh))
        return search.ranking(roots) if keep is None else search.ranking(roots, keep)

    def typed(self, one: Candidate) -> Step:
        """The step as a person would have typed it."""
        return dataclasses.replace(self.step, spec=dataclasses.replace(self.stage, parallel=parallel(self.auto, one, self.machine.devices)))

    def job(self, one: Candidate) -> Job:
        """What is predicted of a candidate."""
        step = placed(self.typed(one), self.machine.devices)
        assert isinstance(step.spec, TrainingStage)
        return Job(self.config, step.spec, step.placement)

    def time(self, one: Candidate) -> StepTime | None:
        """Its seconds by part; None where they are not known."""
        if one not in self.times:
            self.times[one] = seconds(self.job(one), self.machine)
        return self.times[one]

    def lacks(self, one: Candidate) -> tuple[str, ...]:
        """The keys of `hardware` that its time would need."""
        return missing(self.job(one), self.machine)

    def verdict(self, one: Candidate) -> Verdict:
        """What it needs."""
        if one not in self.verdicts:
            step, time = placed(self.typed(one), self.machine.devices), self.times.get(one)
            parts = needs(self.job(one), self.machine)
            self.verdicts[one] = Verdict(step, parts, self.machine.memory_per_device(one.devices), lambda: time.total if time else None)
        return self.verdicts[one]

    def _seconds(self, one: Candidate) -> float | None:
        found = self.time(one)
        return None if found is None else found.total

    def _room(self, one: Candidate) -> int:
        return self.machine.memory_per_device(one.devices)

    def _meshes(self) -> dict[int, list[Candidate]]:
        """Meshes that nothing refuses, by devices: those of all devices, or of the most that work, and one device."""
        most = self.auto.devices or self.machine.devices
        if self.auto.devices:
            found = {most: list(self._allowed(most))}
        else:
            first = next((count for count in range(most, 0, -1) if any(True for _ in self._allowed(count))), most)
            found = {count: list(self._allowed(count)) for count in (first, 1)}
        found = {count: meshes for count, meshes in found.items() if meshes}
        if not found:
            raise self._refused(most)
        return found

    def _allowed(self, devices: int) -> Iterator[Candidate]:
        return (one for one in self.space.meshes(devices) if self.space.rows % (one.dp_replicate * one.dp_shard) == 0 and not self._problems(one))

    def _problems(self, one: Candidate) -> tuple[Problem, ...]:
        """Why a mesh is refused, by the rules that a typed one has to follow."""
        step = self.typed(one)
        assert isinstance(step.spec, TrainingStage)
        found = tuple(capability.problems(step.spec, self.config, step.spec.parallel.mesh(one.devices), f"stage.{self.step.name}"))
        if found:
            return found
        try:
            placed(step, self.machine.devices)
        except PlanError as error:
            return error.problems
        return ()

    def _refused(self, devices: int) -> LmforgeError:
        """Why the simplest mesh is refused, where all are; or that the axes that are typed are none of these devices."""
        for one in self.space.meshes(devices):
            return PlanError.of(self._problems(one))
        axes: dict[str, int | None] = {
            "pp": self.auto.pp or 1,
            "dp_replicate": self.auto.dp_replicate or 1,
            "tp": self.auto.tp or 1,
            "dp_shard": self.auto.dp_shard,
        }
        nothing = Candidate(devices, 1, 1, 1, 1, True, "none", False, 1, 1)
        try:
            mesh(self.auto, nothing, self.machine.devices, axes).mesh(devices)
        except PlanError as error:
            return PlanError.of(Problem(f"stage.{self.step.name}.{one.where}", one.what, one.instead) for one in error.problems)
        raise AssertionError(f"axes that multiply to {devices} devices are a candidate")


def fits_on(open_: Open) -> str:
    """What to plan for instead: the smallest hardware option that something fits on, or what a device would have to hold."""
    catalog = Catalog.of()
    for name, machine in sorted(_machines(catalog), key=lambda one: (one[1].devices * one[1].memory_bytes, one[0])):
        if machine.accelerator != "cuda" or machine.devices < (open_.auto.devices or 1):
            continue
        try:
            there = Open(open_.step, open_.config, machine, open_.prefix)
        except PlanError:  # no mesh of its devices
            continue
        if there.ranking(keep=1, timed=False).best:
            return f"the smallest that something fits on is hardware={name}"
    return ""


def _machines(catalog: Catalog) -> Iterator[tuple[str, Machine]]:
    """The hardware options that are described."""
    for name in sorted(catalog.options["hardware"]):
        values = whole(catalog, "hardware", name)
        if values["type"] != "here":
            node = decode(lookup("hardware", values["type"], name), values, f"hardware={name}")
            assert isinstance(node, Hardware)
            yield name, node.machine()


def parallel(auto: Auto, one: Candidate, available: int) -> Parallel:
    """The option that a candidate is. Keys that are not searched are those of `auto`."""
    if one.offload or not one.plain:
        return mesh(auto, one, available, {"pp": one.pp, "dp_replicate": one.dp_replicate, "dp_shard": one.dp_shard, "tp": one.tp})
    if one.devices == 1:
        return Single(**_every(auto, one))
    return DDP(**_every(auto, one), **_several(auto, one, available))


def mesh(auto: Auto, one: Candidate, available: int, axes: Mapping[str, int | None]) -> Mesh:
    """A mesh with these axes; a sequence is split over none (capability)."""
    own = {"pp_schedule": auto.pp_schedule, "prefetch": auto.prefetch, "reshard_after_forward": one.reshard, "cpu_offload": one.offload}
    return Mesh(**_every(auto, one), **_several(auto, one, available), **own, **axes, cp=1)  # type: ignore[arg-type]


def _every(auto: Auto, one: Candidate) -> dict[str, Any]:
    return {
        "micro_batch_size": one.rows,
        "activation_checkpointing": one.checkpointing,
        "compile": auto.compile,
        "data_workers": auto.data_workers,
        "max_restarts": auto.max_restarts,
        "grace_s": auto.grace_s,
    }


def _several(auto: Auto, one: Candidate, available: int) -> dict[str, Any]:
    return {"devices": auto.devices or (None if one.devices == available else one.devices), "timeout_s": auto.timeout_s}
