"""nearest: the plans beside one that does not fit, ranked by their time. Made only for a refusal, so it may take a moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmforge.codec import decode, encode, keys
from lmforge.compiler import capability
from lmforge.compiler.larger import larger, whole
from lmforge.compiler.verdict import Verdict, verdict
from lmforge.compose.catalog import Catalog
from lmforge.errors import LmforgeError
from lmforge.explain.words import gib
from lmforge.hardware.nodes import Machine
from lmforge.parallel.nodes import Several
from lmforge.plan import Plan, Step
from lmforge.registry import Node, lookup
from lmforge.stage.base import TrainingStage

Fitted = Callable[[Step, Mapping[str, Any], Machine], "Step | Verdict"]
Change = dict[str, Any]  # key of `parallel` or a group of the stage -> value or option

SAME: tuple[Change, ...] = (  # the same result, spread or kept otherwise
    {"parallel": "ddp"},
    {"parallel": "fsdp"},
    {"cpu_offload": True},
    {"parallel": "fsdp", "cpu_offload": True},
)
OTHER: tuple[Change, ...] = (  # another result
    {"adapter": "lora"},
    {"adapter": "qlora"},
    {"optimizer": "adamw_8bit"},
    {"precision": "bf16"},
    {"precision": "bf16", "adapter": "lora"},
)
OPEN = ("activation_checkpointing", "micro_batch_size")
SHOWN = 2  # of either kind


@dataclass(frozen=True)
class Way:
    """What would be typed, and what it would come to."""

    words: str
    found: Verdict
    same: bool

    def said(self, asked: float | None) -> str:
        """`stage.sft.parallel.activation_checkpointing=selective (71.2 GiB, 6 % slower)`."""
        told = [gib(self.found.need)]
        if asked and self.found.seconds:
            more = self.found.seconds / asked - 1
            told.append(f"{100 * abs(more):.0f} % {'slower' if more > 0 else 'faster'}" if abs(more) >= 0.005 else "as fast")
        told += [] if self.same else ["other results"]
        return f"{self.words} ({', '.join(told)})"


def nearest(plan: Plan, step: Step, least: Verdict, machine: Machine, fitted: Fitted) -> str:
    """What to type instead: at most two ways to the same result and two to another, the fastest first; `step` has not been placed."""
    config = plan.experiment.model.config()
    alone = sum(isinstance(one.spec, TrainingStage) for one in plan.steps) == 1
    tried = list(_ways(step, "" if alone else f"stage.{step.name}.", config, machine, fitted))
    ways = [one for same in (True, False) for one in sorted((way for way in tried if way.same is same), key=lambda way: way.found.order())[:SHOWN]]
    if ways:
        return f"type {', or '.join(one.said(least.seconds) for one in ways)}"
    return f"nothing near it fits; {larger(least.need, least.step.placement.devices)}"


def _ways(step: Step, at: str, config: Mapping[str, Any], machine: Machine, fitted: Fitted) -> Iterator[Way]:
    """Those that fit, each under the keys that decide it; `at` is where its keys are typed."""
    assert isinstance(step.spec, TrainingStage)
    typed = [name for name in OPEN if getattr(step.spec.parallel, name) is not None]
    fitting: list[Change] = []
    for change in ({}, *SAME, *OTHER):
        if any(one.items() <= change.items() for one in fitting) or not (change or typed):
            continue  # less of a change fits
        changed = _changed(step, {**change, **dict.fromkeys(typed)}, config, machine)
        found = fitted(changed, config, machine) if changed is not None else None
        if isinstance(found, Step):
            fitting.append(change)
            yield Way(_words(step, at, change, found, typed), verdict(found, config, machine), change not in OTHER)


def _changed(step: Step, change: Change, config: Mapping[str, Any], machine: Machine) -> Step | None:
    """The step after the change; None where it changes nothing, or does not go with the rest of the stage."""
    stage = step.spec
    assert isinstance(stage, TrainingStage)
    try:
        for name, value in change.items():
            if name == "cpu_offload" and not hasattr(stage.parallel, name):
                return None
            if name in OPEN or name == "cpu_offload":
                stage = dataclasses.replace(stage, parallel=dataclasses.replace(stage.parallel, **{name: value}))
            elif hasattr(stage, name):
                stage = dataclasses.replace(stage, **{name: _option(name, value, getattr(stage, name))})
        mesh = stage.parallel.mesh(stage.parallel.world(machine.devices))
        changed = dataclasses.replace(step, spec=stage)
        alone = "parallel" in change and stage.parallel.world(machine.devices) == 1
        if alone or stage == step.spec or any(capability.problems(stage, config, mesh, step.name)):
            return None
    except LmforgeError:
        return None
    return changed


def _option(group: str, option: str, now: Node) -> Any:
    """An option of conf/. What it leaves open, and what every way of running has, stays as it is now."""
    own = whole(Catalog.of(), group, option)
    kind = lookup(group, own["type"], group)
    kept = keys(Several if group == "parallel" else kind)
    before = {name: value for name, value in encode(now).items() if name in kept}
    given = {name: value for name, value in own.items() if value is not None and not (group == "parallel" and name in before)}
    return decode(kind, {**own, **before, **given}, group)


def _words(step: Step, at: str, change: Change, found: Step, typed: Sequence[str]) -> str:
    """The overrides that say it."""
    assert isinstance(found.spec, TrainingStage)
    assert isinstance(step.spec, TrainingStage)
    words = [f"{at}parallel.{name}=true" if value is True else f"{at}{name}={value}" for name, value in change.items()]
    settled = {name: getattr(found.spec.parallel, name) for name in typed}
    words += [f"{at}parallel.{name}={value}" for name, value in settled.items() if value != getattr(step.spec.parallel, name)]
    return " ".join(words)
