"""What the ranks of test_cells.py run: steps of real plans under another `parallel`, on the artifacts that one process made; prints a line a cell.

    cells.py one OUTPUT     in one process: the whole plan of each cell, with parallel=single
    cells.py many OUTPUT    under torchrun: the last training step of each cell again, and how far its figures are from those of one process

A cell is a line of OUTPUT/cells.txt: NAME|PARALLEL|override override ...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from lmforge.compiler import compile
from lmforge.compiler.emit import emit
from lmforge.compose import App, experiment
from lmforge.plan import Plan, Step
from lmforge.runtime import runner
from lmforge.runtime.workspace import Workspace
from lmforge.stage.nodes import TrainingStage
from lmforge.step import Context, Report


class Lines(Report):
    """Keeps the metrics of each interval."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append(dict(metrics))


def planned(output: Path, overrides: str, parallel: str) -> Plan:
    words = [*overrides.split(), f"output={output}", "track=none", *parallel.split()]
    return compile(experiment(App(words, None).compose()))


def last(plan: Plan) -> Step:
    return [step for step in plan.steps if isinstance(step.spec, TrainingStage)][-1]


def one(output: Path, cells: list[list[str]]) -> None:
    for overrides in dict.fromkeys(overrides for _, _, overrides in cells):
        runner.run(planned(output, overrides, "parallel=single"), Console(quiet=True))


def many(output: Path, cells: list[list[str]]) -> None:
    workspace, rank = Workspace(output), int(os.environ["RANK"])
    for number, (name, parallel, overrides) in enumerate(cells):
        plan = planned(output, overrides, f"{parallel} parallel.devices={os.environ['WORLD_SIZE']}")
        step = last(plan)
        job = next(job for job in emit(plan, workspace.folder) if job.step == step)
        folder, report = output / "cells" / str(number), Lines()
        out = folder / step.produces
        out.mkdir(parents=True, exist_ok=True)
        step.spec.run(Context(step=step.name, folder=folder, out=out, inputs=job.inputs, placement=step.placement, report=report))
        if report.logged:
            print(json.dumps({"cell": name, "parallel": parallel, "rank": rank, "apart": apart(workspace.folder(step), report.logged)}), flush=True)


def apart(folder: Path, logged: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference of each figure over all intervals from what one process logged, relative where the figure is above 1."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole = [row for row in rows if "loss" in row]
    timed = ("tokens_per_s", "time", "step")
    both = list(zip(whole, logged, strict=True))
    return {key: max(abs(a[key] - b[key]) / max(1.0, abs(a[key])) for a, b in both) for key in logged[0] if key not in timed and key in whole[0]}


if __name__ == "__main__":
    here = Path(sys.argv[2])
    {"one": one, "many": many}[sys.argv[1]](here, [line.split("|") for line in (here / "cells.txt").read_text().splitlines()])
