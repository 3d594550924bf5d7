"""EXPLAIN: a plan as a person reads it, and what two plans differ in. Text in, text out; no disk, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmforge.codec import encode
from lmforge.plan import Plan, Step

GIB = 2**30
FLOPS = "FLOPs: 6N + 6LdT per token, N active parameters (embeddings included), causal attention"


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
        return
    active = f" ({cost.params_active:,} active)" if cost.params_active != cost.params_total else ""
    yield f"{cost.params_total:,} parameters{active}, {cost.params_trainable:,} trainable; {cost.tokens:,} tokens; {cost.train_flops:.3g} FLOPs"
    parts = ", ".join(f"{name} {gib(getattr(peak, name))}" for name in ("params", "grads", "optimizer"))
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.placement.mesh.items() if size > 1)
    yield f"static memory {gib(peak.static)} a device ({parts}) on {step.placement.devices} device(s){f', mesh {mesh}' if mesh else ''}"
    if cost.communication:
        sent = ", ".join(f"{kind.replace('_', '-')} {gib(size)}" for kind, size in cost.communication.items())
        yield f"communication a step and device: {sent}"
    options = ", ".join(f"{key} {value}" for key, value in flatten(step.placement.strategy).items() if key != "strategy")
    yield f"strategy {step.placement.strategy['strategy']}: {options}"


def gib(count: int | None) -> str:
    """Bytes as GiB or MiB (2^30, 2^20)."""
    if count is None:
        return "not estimated"
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Plain data as dotted keys."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}


def changes(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """Dotted keys that differ, with both values; a key one side lacks shows as None."""
    left, right = flatten(before), flatten(after)
    return [(key, left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]


def diff(before: Plan, after: Plan) -> str:
    """What two plans differ in, and which steps of the first cannot be used for the second."""
    lines = []
    named = {step.name: step for step in before.steps}
    for step in after.steps:
        old = named.pop(step.name, None)
        if old is None:
            lines.append(f"+ {step.name}: new step")
        elif old.digest != step.digest:
            lines.append(f"~ {step.name}: runs again ({because(old, step)})")
        for key, left, right in changes(encode(old.spec), encode(step.spec)) if old else []:
            lines.append(f"    {key}: {left} -> {right}")
        for key, left, right in changes(encode(old.cost), encode(step.cost)) if old else []:
            lines.append(f"    cost.{key}: {left} -> {right}")
    lines.extend(f"- {name}: gone" for name in named)
    kept = sum(step.digest in {one.digest for one in before.steps} for step in after.steps)
    return "\n".join([*lines, f"{kept} of {len(after.steps)} steps are the same in both"])


def because(old: Step, new: Step) -> str:
    """Why a step is another step than before."""
    reasons = [key for key, _, _ in changes(encode(old.spec, identity=True), encode(new.spec, identity=True))][:4]
    if old.content != new.content:
        reasons.append("its model changed" if hasattr(new.spec, "model") else "its data changed")
    return ", ".join(reasons) or "what it consumes changed"
