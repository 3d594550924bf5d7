"""`plan --why KEY`: what set a key, in order, which one won, and what the compiler made of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lmforge.codec import encode
from lmforge.compiler import compile
from lmforge.compose import App
from lmforge.compose.why import Why, why
from lmforge.errors import PlanError
from lmforge.plan import Plan, Step

NOTHING = object()
PLACED = ("micro_batch_size", "devices")  # keys of `parallel` that `place` decides, beside the axes of a mesh
WIDEST = 60


def answer(app: App, key: str, implied: str) -> str:
    """The text. A plan that is refused still says where the key comes from, and why nothing is derived from it."""
    found = why(app, key, implied)
    lines = list(_layers(found))
    try:
        lines.extend(_derived(found, compile(found.experiment)))
    except PlanError as error:
        lines.append(f"not resolved, the plan is refused: {error.problems[0]}")
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def _layers(found: Why) -> Iterator[str]:
    head = f"{found.key} = {_said(found.value)}"
    yield f"{head}  # {found.meaning}" if found.meaning else head
    where = max((len(one.where) for one in found.layers), default=0)
    says = min(WIDEST, max((len(one.says) for one in found.layers), default=0))
    for one in found.layers:
        wins = "<- wins" if one is found.layers[-1] else ""
        yield f"{one.where:<{where}}  {one.says:<{says}}  {'; '.join(part for part in (wins, one.note) if part)}".rstrip()


def _derived(found: Why, plan: Plan) -> Iterator[str]:
    """What the plan has in the key's place, and the arithmetic that says so."""
    head, *rest = found.key.split(".")
    if head == "stage" and len(rest) > 1:
        step = plan.step(rest[0])
        if (made := _resolved(step, rest[1:])) is not NOTHING and made != found.value:
            yield f"in the plan: {_said(made)}{_arithmetic(step, rest[-1], made)}"
    plainly = []
    for reader in found.readers:
        step = plan.step(reader.stage)
        if (made := _resolved(step, reader.key.split(".")[2:])) is NOTHING:
            continue
        if reader.owns:
            yield f"not read by {reader.stage}, which has its own: {reader.key} = {_said(made)}"
        elif made != found.value:
            yield f"in the plan of {reader.stage}: {_said(made)}{_arithmetic(step, rest[-1], made)}"
        else:
            plainly.append(reader.stage)
    if plainly:
        yield f"read by {', '.join(plainly)}"


def _resolved(step: Step, path: list[str]) -> Any:
    """The value that the plan has at a stage's key: in the resolved stage, or in its placement. NOTHING for what holds keys, or is not there."""
    value: Any = encode(step.spec)
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return NOTHING
        value = value[part]
    if path[0] == "parallel" and len(path) == 2 and (path[1] in PLACED or path[1] in step.placement.mesh):
        return step.placement.mesh.get(path[1]) or getattr(step.placement, path[1])
    return NOTHING if isinstance(value, Mapping) else value


def _arithmetic(step: Step, name: str, value: Any) -> str:
    """The lines of a step's arithmetic that name the key or hold its value."""
    number = re.escape(f"{value:,}") if isinstance(value, int) else re.escape(str(value))
    told = [line for line in step.arithmetic if not line.startswith("auto: ")] + [line for line in step.arithmetic if line.startswith("auto: ")][:1]
    lines = [line for line in told if re.search(rf"\b{name}\b|(?<![\d.,]){number}(?![\d.,])", line)]
    return f" ({'; '.join(lines)})" if lines else ""


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("type", "")) or ", ".join(value)
    return "null" if value is None else str(value)
