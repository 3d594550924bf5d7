"""What two plans differ in, what that costs or saves, and which steps run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lmforge.codec import encode
from lmforge.explain.changes import changes
from lmforge.explain.words import count, duration, gib, plain
from lmforge.plan import Cost, Plan, Step

Words = Callable[[float], str]


def diff(before: Plan, after: Plan) -> str:
    """What two plans differ in, and which steps of the first cannot be used for the second."""
    lines, again = [], []
    named = {step.name: step for step in before.steps}
    for step in after.steps:
        old = named.pop(step.name, None)
        if old is None:
            lines.append(f"+ {step.name}: new step")
            continue
        if old.digest != step.digest:
            again.append(step.name)
            lines.append(f"~ {step.name}: runs again ({because(old, step)})")
        found = [f"    {key}: {left} -> {right}" for key, left, right in changes(encode(old.spec), encode(step.spec))]
        found.extend(f"    {line}" for line in consequences(old, step))
        if found and old.digest == step.digest:
            lines.append(f"= {step.name}: the same step, run in another way")
        lines.extend(found)
    lines.extend(f"- {name}: gone" for name in named)
    lines.extend(totals(before, after))
    kept = sum(step.digest in {one.digest for one in before.steps} for step in after.steps)
    if again:
        lines.append(f"what the first plan made of {', '.join(again)} cannot be used for the second")
    return "\n".join([*lines, f"{kept} of {len(after.steps)} steps are the same in both"])


def because(old: Step, new: Step) -> str:
    """Why a step is another step than before."""
    reasons = [key for key, _, _ in changes(encode(old.spec, identity=True), encode(new.spec, identity=True))][:4]
    if old.content != new.content:
        reasons.append("its model changed" if hasattr(new.spec, "model") else "its data changed")
    return ", ".join(reasons) or "what it consumes changed"


def consequences(old: Step, new: Step) -> Iterator[str]:
    """What a step takes more or less than before, each with its difference and the share; what did not change is not told."""
    yield from _memory(old, new)
    here, there = old.cost, new.cost
    for name, pick, said in FIGURES if there.tokens is not None else ():
        if line := change(name, pick(here), pick(there), said):
            yield line
    if here.communication is not None and there.communication is not None:
        sent = change("communication a step and device", sum(here.communication.values()), sum(there.communication.values()), gib)
        yield from [sent] if sent else []
    if old.placement.devices != new.placement.devices:
        yield f"devices: {old.placement.devices} -> {new.placement.devices}"


def _memory(old: Step, new: Step) -> Iterator[str]:
    """The peak of a device, and which of its parts changed; what lies still where no peak is estimated."""
    here, there = old.cost.peak_bytes_per_device, new.cost.peak_bytes_per_device
    whole = here.total is not None and there.total is not None
    before, after = (here.total, there.total) if whole else (here.static or None, there.static or None)
    line = change("memory a device" if whole else "static memory a device", before, after, gib)
    parts = [f"{key} {gib(right - left)}" for key, left, right in changes(_parts(here), _parts(there)) if left is not None and right is not None]
    signed = ", ".join(part if " -" in part else part.replace(" ", " +", 1) for part in parts)
    if line:
        yield f"{line}{f': {signed}' if len(parts) > 1 else ''}"
    elif parts:
        yield f"memory a device: as much as before, other parts: {signed}"


def _parts(peak: Any) -> dict[str, int]:
    plain: dict[str, Any] = encode(peak)
    inner = plain.get("parts")
    return dict(inner) if isinstance(inner, dict) else {key: value for key, value in plain.items() if isinstance(value, int) and key != "total"}


def _step_seconds(cost: Cost) -> float | None:
    """The expected seconds of an optimizer step."""
    return None if cost.step_seconds is None else cost.step_seconds.expected


FIGURES: tuple[tuple[str, Callable[[Cost], float | None], Words], ...] = (
    ("time a step", _step_seconds, duration),
    ("time in all", lambda cost: cost.seconds, duration),
    ("device-hours", lambda cost: cost.device_hours, plain),
    ("money", lambda cost: cost.money, plain),
    ("tokens", lambda cost: cost.tokens, count),
    ("FLOPs", lambda cost: cost.train_flops, lambda flops: f"{flops:.3g}"),
    ("trainable parameters", lambda cost: cost.params_trainable, count),
)


def change(name: str, before: float | None, after: float | None, said: Words) -> str:
    """`name: 12.3 GiB -> 14.1 GiB (+1.8 GiB, +15 %)`; empty where nothing changed, or neither side is known."""
    if before == after:
        return ""
    if before is None or after is None:
        return f"{name}: {'-' if before is None else said(before)} -> {'-' if after is None else said(after)}"
    sign = "+" if after > before else ""
    share = f", {sign}{100 * (after / before - 1):.3g} %" if before else ""
    return f"{name}: {said(before)} -> {said(after)} ({sign}{said(after - before)}{share})"


def totals(before: Plan, after: Plan) -> Iterator[str]:
    """The whole plan's time, device-hours, tokens and FLOPs, where several training steps make it up and any of them changed."""
    if all(sum(step.cost.tokens is not None for step in plan.steps) < 2 for plan in (before, after)):
        return
    for name, pick, said in FIGURES[1:6]:
        left, right = (_total(plan, pick) for plan in (before, after))
        if left is not None and right is not None and (line := change(name, left, right, said)):
            yield f"all steps: {line}"


def _total(plan: Plan, pick: Callable[[Cost], float | None]) -> float | None:
    """The sum over training steps; None where one of them is not known."""
    values = [pick(step.cost) for step in plan.steps if step.cost.tokens is not None]
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)
