"""A plan as a tree that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmforge.explain.changes import flatten
from lmforge.explain.words import duration, gib, plain
from lmforge.plan import Cost, PeakBytes, Plan, Step

FLOPS = (
    "FLOPs: 6N + 6LdT per token, N active parameters (embeddings included), causal attention; "
    "MFU counts the products of all models of a step, 4N where a base is frozen"
)


@dataclass(frozen=True)
class Status:
    """What the store knows of a step: `done`, `stale`, `partial` or `new`, and why."""

    state: str
    why: str = ""


def render(plan: Plan, statuses: Mapping[str, Status]) -> str:
    """The plan as a tree: a step under the one whose weights (or data) it takes."""
    machine = plan.experiment.hardware.machine()
    done = sum(statuses[step.name].state == "done" for step in plan.steps)
    head = (
        f"{plan.experiment.name}: {len(plan.steps)} steps, {done} done; {machine.name}: {machine.devices} x {machine.accelerator}, {gib(machine.memory_bytes)}"
    )
    children: dict[str | None, list[Step]] = {}
    for step in plan.steps:
        children.setdefault(parent(step), []).append(step)
    rows = list(_lines(children, None, "", statuses))
    width = max(len(left) for left, right in rows if right) + 2
    lines = [f"{left:<{width}}{right}" if right else left for left, right in rows]
    return "\n".join([head, *lines, FLOPS])


def parent(step: Step) -> str | None:
    """The step it hangs under: the weights it takes, else the last thing made for it."""
    for artifact in step.inputs:
        if artifact.kind == "checkpoint":
            return artifact.step
    return step.inputs[-1].step if step.inputs else None


def _lines(children: Mapping[str | None, list[Step]], at: str | None, indent: str, statuses: Mapping[str, Status]) -> Iterator[tuple[str, str]]:
    steps = children.get(at, [])
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        status = statuses[step.name]
        why = f" ({status.why})" if status.why else ""
        yield f"{indent}{'└─ ' if last else '├─ '}{step.name} [{step.stage}]", f"{status.state}{why}; {flow(step)}"
        below = indent + ("   " if last else "│  ")
        bar = "│  " if children.get(step.name) else "   "
        for line in details(step):
            yield f"{below}{bar}{line}", ""
        yield from _lines(children, step.name, below, statuses)


def flow(step: Step) -> str:
    """What it takes and makes."""
    takes = " + ".join(dict.fromkeys(one.step for one in step.inputs))
    return f"{takes} -> {step.produces}" if takes else f"-> {step.produces}"


def details(step: Step) -> Iterator[str]:
    """Batch, budget, parameters, FLOPs, memory and devices of a training step."""
    yield from step.arithmetic
    cost, peak = step.cost, step.cost.peak_bytes_per_device
    if cost.params_trainable is None:
        yield from _peak(peak)
        return
    active = f" ({cost.params_active:,} active)" if cost.params_active != cost.params_total else ""
    yield f"{cost.params_total:,} parameters{active}, {cost.params_trainable:,} trainable; {cost.tokens:,} tokens; {cost.train_flops:.3g} FLOPs"
    parts = ", ".join(f"{name} {gib(getattr(peak, name))}" for name in ("params", "grads", "optimizer"))
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.placement.mesh.items() if size > 1)
    yield f"static memory {gib(peak.static)} a device ({parts}) on {step.placement.devices} device(s){f', mesh {mesh}' if mesh else ''}"
    yield from _peak(peak)
    if cost.step_seconds:
        yield from _time(cost)
    if cost.communication:
        sent = ", ".join(f"{kind.replace('_', '-')} {gib(size)}" for kind, size in cost.communication.items())
        yield f"communication a step and device: {sent}"
    options = ", ".join(f"{key} {value}" for key, value in flatten(step.placement.strategy).items() if key != "strategy")
    yield f"strategy {step.placement.strategy['strategy']}: {options}"


def _peak(peak: PeakBytes) -> Iterator[str]:
    """The fullest moment, with what is there."""
    if peak.total is not None and peak.parts:
        found = ", ".join(f"{name} {gib(size)}" for name, size in sorted(peak.parts.items(), key=lambda one: -one[1]))
        yield f"peak memory {gib(peak.total)} a device, in {peak.moment} ({found})"


def _time(cost: Cost) -> Iterator[str]:
    """Seconds of a step with their band and what they go to, and all steps with what they cost."""
    band = cost.step_seconds
    assert band is not None
    assert cost.step_parts is not None
    assert cost.seconds is not None
    used = "" if cost.mfu is None else f", MFU {cost.mfu:.2f}, HFU {cost.hfu:.2f}"
    yield f"{duration(band.expected)} a step ({duration(band.low)} to {duration(band.high)}), {plain(cost.tokens_per_second or 0)} tokens/s{used}"
    parts = ", ".join(f"{name} {100 * taken / band.expected:.0f} %" for name, taken in sorted(cost.step_parts.items(), key=lambda one: -one[1]))
    yield f"of a step: {parts}"
    paid = "" if cost.money is None else f", {cost.money:,.0f} in money"
    energy = "" if cost.energy_kwh is None else f", {cost.energy_kwh:,.3g} kWh"
    yield f"{duration(cost.seconds)} in all, {plain(cost.device_hours or 0.0)} device-hours{paid}{energy}"
