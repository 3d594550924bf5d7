"""Run a plan: every step that is not done yet, in order, each under its lock; then the manifest of the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lmforge.codec import encode, keys
from lmforge.compiler.emit import Job, emit
from lmforge.errors import PlanError, Problem
from lmforge.explain import render
from lmforge.formats.store import STATE_INDEX, read_json
from lmforge.plan import Plan, Step
from lmforge.registry import Node
from lmforge.runtime import summary
from lmforge.runtime.disk import readable
from lmforge.runtime.given import described, fits
from lmforge.runtime.launch import Company, allowed, launch
from lmforge.runtime.progress import LiveReport
from lmforge.runtime.ranks import Crash
from lmforge.runtime.stopping import Asked, noted, requeue, signals
from lmforge.runtime.workspace import MEASURED, Workspace
from lmforge.track.jsonl import Metrics
from lmforge.track.nodes import ArtifactRef, RunInfo, Tracker

TRACKED = ("stage", "eval", "quantize")  # groups whose steps are runs in the tracker; preparing data is not
RECORDED = ("torch", "lightning", "transformers", "tokenizers", "datasets", "lmforge")


def run(plan: Plan, console: Console, company: Company | None = None) -> dict[str, Any]:
    """Make the plan true; returns the metrics of each step. Ctrl-C leaves every finished step and the last state in place, and so does
    a scheduler's signal, after which a Slurm job goes back into the queue. Steps on many devices run with `company`, where there is one."""
    with signals() as asked:
        try:
            metrics = _run(plan, console, company, asked)
            if asked and asked.to_stop:  # in the last moment of the last step; what would come after this plan does not begin
                raise KeyboardInterrupt
            return metrics
        except KeyboardInterrupt:
            requeue(plan, asked, console)
            raise


def _run(plan: Plan, console: Console, company: Company | None, asked: Asked | None) -> dict[str, Any]:
    runnable(plan, company)
    workspace = Workspace(plan.experiment.output)
    statuses = workspace.statuses(plan)
    waiting = [step for step in plan.steps if statuses[step.name].state != "done"]
    if company:
        fits(waiting, company.numbers()[0])
    for step in waiting:
        step.spec.preflight()
    workspace.prepare()
    console.print(render(plan, statuses), highlight=False, markup=False, soft_wrap=True)
    started = time.monotonic()
    fresh = bool(waiting)
    folder = (None if fresh else workspace.run_of(plan)) or workspace.open_run(plan)
    for job in emit(plan, workspace.folder):
        if asked and asked.to_stop and not workspace.is_done(job.step):
            raise KeyboardInterrupt  # of a step that was done before it could stop
        _ensure(job, plan, workspace, console, company)
    metrics = {step.name: workspace.record(step)["metrics"] for step in plan.steps}
    workspace.close_run(folder, plan, metrics)
    if not fresh:
        console.print(f"every step is done already ({len(plan.steps)} of {len(plan.steps)}); nothing ran", highlight=False)
    summary.show(console, plan, metrics, folder, workspace)
    console.print(f"{time.monotonic() - started:.0f} s in all", highlight=False)
    return metrics


def runnable(plan: Plan, company: Company | None = None) -> None:
    """Refuse what can be planned but not run. With `company` the machine is what its ranks make up."""
    problems: list[Problem] = []
    machine, here = plan.experiment.hardware.machine(), plan.experiment.hardware.type == "here"
    if not here and company is None:
        problems.append(described(machine.name))
    problems.extend(missing_extras(plan))
    if problems:
        raise PlanError.of(problems)


def missing_extras(plan: Plan) -> Iterator[Problem]:
    """Packages that some node of the plan needs and this machine lacks, with the extra that installs them."""
    for where, node in [*((step.name, one) for step in plan.steps for one in nodes(step.spec)), ("track", plan.experiment.track)]:
        for module, extra in node.needs.items():
            if importlib.util.find_spec(module) is None:
                yield Problem(f"{where}: {node.group}={node.type}", f"needs {module}, which is not installed", f'type: pip install "lmforge[{extra}]"')


def nodes(node: Node) -> Iterator[Node]:
    """A node and those within it."""
    yield node
    for name in keys(type(node)):
        if isinstance(inner := getattr(node, name), Node):
            yield from nodes(inner)


def _ensure(job: Job, plan: Plan, workspace: Workspace, console: Console, company: Company | None) -> None:
    """Run a job unless its step is done, here or meanwhile in another process."""
    step = job.step
    if workspace.is_done(step):
        return
    with workspace.lock(step, lambda line: console.print(line, highlight=False, markup=False)):
        if workspace.is_done(step):
            return
        with readable(step.name, workspace.output):
            _until_done(job, plan, workspace, console, company)


def _until_done(job: Job, plan: Plan, workspace: Workspace, console: Console, company: Company | None) -> None:
    """Run a job; after a crash again, from its last state, as often as `parallel.max_restarts` says. Errors of ours would only come again."""
    for attempt in range(allowed(job.step) + 1):
        try:
            return _attempt(job, plan, workspace, console, company, attempt)
        except Crash as crash:
            if attempt == allowed(job.step):
                raise
            done = _resumed_from(job.folder)
            line = f"{job.step.name}: {crash.reason}; restart {attempt + 1} of {allowed(job.step)}, from {f'step {done}' if done else 'its beginning'}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _attempt(job: Job, plan: Plan, workspace: Workspace, console: Console, company: Company | None, attempt: int) -> None:
    step = job.step
    workspace.clean(step)
    resumed = _resumed_from(job.folder)
    tracker = _tracker(step, plan, job.folder, resumed, console)
    lines = Metrics(job.folder / "metrics.jsonl")
    lines.rewind(resumed or 0)
    started = time.monotonic()
    try:
        with contextlib.closing(lines), LiveReport(step.name, console, lines, tracker) as report:
            metrics = launch(job, report, company, attempt)
    except BaseException as error:
        if tracker:
            tracker.finish({"error": type(error).__name__}, exit_code=1)
        raise
    seconds = time.monotonic() - started
    with noted():  # all ranks are through, so the step is done
        machine = plan.experiment.hardware.machine().fingerprint if MEASURED in metrics else None
        workspace.finish(step, metrics, seconds, versions(), machine)
    if tracker:
        made = {one.name: one for one in plan.steps}
        inputs = [ArtifactRef(f"{one.step}-{made[one.step].digest}", one.kind, job.inputs[one.kind]) for one in step.inputs]
        tracker.artifact(ArtifactRef(f"{step.name}-{step.digest}", step.produces, job.folder / step.produces), inputs)
        tracker.finish(summary.flat(metrics))
    console.print(f"{step.name}: {summary.line(step, metrics)} ({seconds:.0f} s)", highlight=False, markup=False, soft_wrap=True)


def _tracker(step: Step, plan: Plan, folder: Path, resumed: int | None, console: Console) -> Tracker | None:
    if step.group not in TRACKED:
        return None
    info = RunInfo(
        id=f"{step.name}-{step.digest}".replace(".", "-"),
        name=f"{step.name}-{step.digest[:8]}",
        experiment=plan.experiment.name,
        stage=step.stage,
        config=encode(step) | {"model": plan.experiment.model.config(), "experiment": plan.experiment.name},
        folder=folder,
        resumed_from=resumed,
    )
    return plan.experiment.track.open(info, lambda line: console.print(line, highlight=False, markup=False))


def _resumed_from(folder: Path) -> int | None:
    index = folder / STATE_INDEX
    return int(read_json(index)["step"]) if index.is_file() else None


def versions() -> Mapping[str, str]:
    """What the step was made with: recorded, never part of a digest."""
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in RECORDED}
