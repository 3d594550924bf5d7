"""What the ranks of test_cells.py run: steps of real plans under another `parallel`, on the artifacts that one process made.

    cells.py one OUTPUT     in one process: the whole plan of each cell, with parallel=single
    cells.py many OUTPUT    under torchrun: the last training step of each cell again, and how far its figures are from those of one process

A cell is a line of OUTPUT/cells.txt: NAME|PARALLEL|override override ...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from lmforge.compiler import compile
from lmforge.compiler.emit import emit
from lmforge.compose import App, experiment
from lmforge.plan import Plan, Step
from lmforge.runtime import runner
from lmforge.runtime.workspace import Workspace
from lmforge.stage.nodes import TrainingStage
from lmforge.step import Context, Report
from lmforge.training.module import TrainingModule


class Lines(Report):
    """Keeps the metrics of each interval."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append(dict(metrics))


class Dtypes(TorchDispatchMode):
    """Of what reaches the matrix products of layers (a rotary table's are batched) and the sums over ranks of more than a few figures, in forward and backward
    passes of training: not in preflight, a rollout's advantages or an update.
    """

    SOME = 500

    def __init__(self) -> None:
        super().__init__()
        self.products: set[str] = set()
        self.sums: set[str] = set()

    @contextlib.contextmanager
    def of_steps(self) -> Iterator[None]:
        """Looks at what training runs inside this."""
        inner = TrainingModule._backward

        def watched(module: TrainingModule, batch: Any) -> Any:
            with self:
                return inner(module, batch)

        TrainingModule._backward = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            TrainingModule._backward = inner  # type: ignore[method-assign]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name in ("aten.mm.default", "aten.addmm.default"):
            self.products.add(str(args[-1].dtype).removeprefix("torch."))
        elif name.startswith(("c10d.", "_c10d_functional.")) and "reduce" in name:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            if first.numel() >= self.SOME:
                self.sums.add(str(first.dtype).removeprefix("torch."))
        return function(*args, **(kwargs or {}))


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
        context = Context(step=step.name, folder=folder, out=out, inputs=job.inputs, placement=step.placement, report=report)
        seen = Dtypes()
        with seen.of_steps() if "precision" in overrides else contextlib.nullcontext():  # not elsewhere: it makes each operation slower
            step.spec.run(context)
        row = {"cell": name, "parallel": parallel, "products": sorted(seen.products), "sums": sorted(seen.sums)}
        row |= {"apart": apart(workspace.folder(step), report.logged)} if report.logged else {}
        with (output / f"found-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


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
