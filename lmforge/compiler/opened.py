"""opened: what a step that trains nothing needs of the one device it runs on, and its refusal where that is too much."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lmforge.compiler.larger import larger
from lmforge.errors import Problem
from lmforge.explain.words import gib
from lmforge.hardware.nodes import Machine
from lmforge.model.fetch import FetchWeights
from lmforge.model.weights import max_positions
from lmforge.plan import Step
from lmforge.precision.nodes import Dtype
from lmforge.predict import reading
from lmforge.predict.memory import Peak
from lmforge.stage.base import TrainingStage
from lmforge.tokenizer.nodes import Tokenize

UNKNOWN = "bfloat16"  # which most published weights are in; what hub weights are in is known when they are there


def peak(step: Step, before: Mapping[str, Step], config: Mapping[str, Any], machine: Machine, *, least: bool = False) -> Peak | None:
    """Its memory, given the steps before it by name; with `least` that of the shortest sequences it may be given. None where it opens no model."""
    makers = [before[one.step] for one in step.inputs]
    rows = [one.spec.seq_len for one in makers if isinstance(one.spec, Tokenize)]
    found = step.spec.reads(min(max(rows, default=max_positions(config)), max_positions(config)))
    if found is not None and found.shorter and least:
        found = dataclasses.replace(found, length=1)
    return None if found is None else reading.peak(config, found, _saved(makers, before), machine)


def _saved(makers: Sequence[Step], before: Mapping[str, Step]) -> str:
    """The dtype of the checkpoint that one of them makes; a merged one has its base's."""
    maker = next((one for one in makers if one.produces == "checkpoint"), None)
    if maker is None:
        return UNKNOWN
    if isinstance(maker.spec, TrainingStage):
        return maker.spec.precision.param_dtype
    if isinstance(maker.spec, FetchWeights):
        stated = maker.spec.dtype
        return next((one for one in get_args(Dtype) if one == stated), UNKNOWN)
    return _saved([before[one.step] for one in maker.inputs], before)


def refusal(step: Step, found: Peak, machine: Machine) -> Problem:
    """What is too large, and what would hold it; a measurement can be left out."""
    parts = ", ".join(f"{part} {gib(size)}" for part, size in sorted(found.parts.items(), key=lambda one: -one[1])[:2] if size)
    what = f"opens the whole model on one device, and needs {gib(found.total)} of {gib(machine.memory_per_device(1))} of {machine.name} ({parts})"
    if step.group != "eval":
        return Problem(step.name, what, larger(found.total, 1))
    fewer = found.total - found.parts["beside"] <= machine.memory_per_device(1)
    return Problem(step.name, what, f"type {'eval.untrained=false' if fewer else 'eval=none'}; or {larger(found.total, 1)}")
