"""run what the overrides say (the default verb); `-m` runs every point of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.compose.app import of_job
from lmforge.errors import LmforgeError
from lmforge.experiment import Experiment
from lmforge.verbs._arguments import app_of, hydra_flags
from lmforge.verbs._help import show as show_help


def main(argv: Sequence[str]) -> int:
    """Compose, compile, run."""
    if {"--help", "-h"} & set(argv):
        return show_help()
    if {"--version"} & set(argv):
        from importlib.metadata import version

        print(version("lmforge"))
        return 0
    app, args = app_of(argv)
    if hydra_flags(app, args):
        return 0
    if args.multirun or any(one.key == "sweep" for one in app.typed):
        return _multirun(app)
    _execute(experiment(app.compose()))
    return 0


def _execute(experiment: Experiment) -> dict[str, Any]:
    plan = compile(experiment)
    from rich.console import Console

    from lmforge.runtime.runner import run

    return run(plan, Console())


def _multirun(app: App) -> int:
    batches = app.multirun(point)
    failed = sum(one.return_value is None for batch in batches for one in batch)
    if failed:
        print(f"{failed} points of the sweep failed; the others are kept", file=sys.stderr)
    return 2 if failed else 0


def point(config: DictConfig) -> float | None:
    """One point of a sweep, in whichever process the launcher gives it; its value is the last step's main metric.

    A refusal is printed and gives None, so that one bad point does not end the others.
    """
    from lmforge.runtime.summary import objective

    try:
        return objective(_execute(experiment(of_job(config))))
    except LmforgeError as error:
        print(error, file=sys.stderr)
        return None
