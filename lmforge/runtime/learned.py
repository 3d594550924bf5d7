"""What finished training steps of a store teach a calibration: how much longer than predicted they took on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmforge.errors import LmforgeError
from lmforge.formats import store
from lmforge.hardware.nodes import Machine
from lmforge.plan import Plan
from lmforge.predict.job import Job
from lmforge.predict.time import seconds
from lmforge.runtime.residuals import measured
from lmforge.stage.base import TrainingStage

MOST = 2.0  # that runs may correct by, either way: more is a machine that was busy
TIMED = 3  # steps, at least, that a median is taken of


def correction(output: str | Path, machine: Machine) -> tuple[float, int]:
    """The median of measured over predicted step seconds, predicted anew with the machine's calibration, and of how many steps it is; (1, 0) of none."""
    found = list(_ratios(output, machine))
    return (min(max(statistics.median(found), 1 / MOST), MOST), len(found)) if found else (1.0, 0)


def _ratios(output: str | Path, machine: Machine) -> Iterator[float]:
    """Of stages whose lengths the plan knows: answers that end early and prompts that are shared make a step shorter than the keys allow."""
    configs = dict(_configs(output))
    for one in measured(output, machine.fingerprint):
        spec, took, config = one.step.spec, one.measured.get("step_seconds"), configs.get(one.step.digest)
        if not isinstance(spec, TrainingStage) or config is None or not took or one.measured.get("timed_steps", 0) < TIMED:
            continue
        job = Job(config, spec, one.step.placement)
        predicted = None if job.workload.rollout or any(each.pairs for each in job.workload.passes) else seconds(job, machine)
        if predicted is not None:
            yield took / predicted.total


def _configs(output: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The model's config of each step's digest, from the plans of finished runs that this version can read."""
    root = store.runs(output)
    for file in sorted(root.glob("*/plan.json")) if root.is_dir() else []:
        try:
            plan = Plan.from_json(store.read_json(file))
            config = plan.experiment.model.config()
        except (LmforgeError, LookupError, TypeError, ValueError, OSError):  # of another version, or of a model that is gone
            continue
        yield from ((step.digest, config) for step in plan.steps)
