"""The middle of the compiler: passes from Plan to Plan, none of which imports torch."""

from __future__ import annotations

from lmforge.compiler.auto import auto
from lmforge.compiler.estimate import estimate
from lmforge.compiler.expand import expand
from lmforge.compiler.place import place
from lmforge.compiler.resolve import resolve
from lmforge.compiler.validate import validate
from lmforge.errors import PlanError, did_you_mean
from lmforge.experiment import Experiment
from lmforge.plan import Plan

PASSES = (expand, validate, resolve, auto, place, estimate)


def compile(experiment: Experiment, until: str = "estimate") -> Plan:
    """The plan of an experiment, after the pass named `until`."""
    names = [one.__name__ for one in PASSES]
    if until not in names:
        raise PlanError("until", f"no pass {until!r}", did_you_mean(until, names))
    plan = Plan(experiment=experiment)
    for one in PASSES[: names.index(until) + 1]:
        plan = one(plan)
    return plan
