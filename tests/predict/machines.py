"""Machines and jobs of the config, for tests of what is predicted."""

from __future__ import annotations

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.hardware.nodes import Machine
from lmforge.predict.job import Job
from lmforge.stage.base import TrainingStage


def machine(option: str, *words: str) -> Machine:
    """The machine of `hardware=option`."""
    return experiment(App([f"hardware={option}", "stage=pretrain", *words]).compose()).hardware.machine()


def planned(*words: str) -> tuple[Job, Machine]:
    """The last training stage of a plan, placed, and the machine it is for."""
    plan = compile(experiment(App(list(words)).compose()), until="place")
    step = [one for one in plan.steps if isinstance(one.spec, TrainingStage)][-1]
    assert isinstance(step.spec, TrainingStage)
    return Job(plan.experiment.model.config(), step.spec, step.placement), plan.experiment.hardware.machine()
