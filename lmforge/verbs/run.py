"""run what the overrides say (the default verb); `-m` runs every point of a sweep.

Under torchrun or srun every process gets here: the first prints and drives, the others hold its ranks and say nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.compose.app import of_job
from lmforge.errors import LmforgeError
from lmforge.experiment import Experiment
from lmforge.runtime.given import across, given
from lmforge.runtime.ranks import INTERRUPTED
from lmforge.verbs._arguments import app_of, hydra_flags
from lmforge.verbs._help import show as show_help

# submitit's files are read on other machines, so they lie with the run's own, not in this machine's temporary folder.
SHARED = ("hydra.sweep.dir=${output}/submitit", "hydra.launcher.submitit_folder=${hydra.sweep.dir}/%j")


def main(argv: Sequence[str]) -> int:
    """Compose, compile, run."""
    if {"--help", "-h"} & set(argv):
        return show_help()
    if {"--version"} & set(argv):
        from importlib.metadata import version

        print(version("lmforge"))
        return 0
    if given() is None:
        return _main(argv)
    from lmforge.runtime.external import company
    from lmforge.runtime.peers import Told

    try:
        return _together(argv)
    except Told as told:
        if peers := company():
            peers.hear_out()
        return told.code


def _main(argv: Sequence[str]) -> int:
    app, args = app_of(argv)
    if hydra_flags(app, args):
        return 0
    if args.multirun or any(one.key == "sweep" for one in app.typed):
        return _multirun(app, args.config_dir)
    _execute(lambda: experiment(app.compose()))
    return 0


def _together(argv: Sequence[str]) -> int:
    """The same on every given rank, once all of them know that they were started with the same words."""
    from lmforge.runtime.external import company

    peers = company()
    assert peers is not None
    words = hashlib.sha256("\n".join(argv).encode()).hexdigest()
    app, args = peers.agree(lambda: app_of(argv), lambda _: {"the command line": words})
    if not (args.cfg or args.info or args.hydra_help or args.shell_completion):
        if args.multirun or any(one.key == "sweep" for one in app.typed):
            return _multirun(app, args.config_dir)
        _execute(lambda: experiment(app.compose()))
    elif peers.first:
        hydra_flags(app, args)
    return 0


def _execute(meant: Callable[[], Experiment]) -> dict[str, Any]:
    """The metrics of each step of what is `meant`. Told, where this is not the first of several ranks and the plan failed."""
    from rich.console import Console

    from lmforge.runtime.external import company, together
    from lmforge.runtime.runner import run

    peers = company()
    if peers is None:
        return run(compile(meant()), Console())
    world, local_world, _ = peers.numbers()
    return together(peers, lambda: compile(across(meant(), world, local_world)), Console())


def _multirun(app: App, config_dir: str | None) -> int:
    batches = _for_slurm(app, config_dir).multirun(point)
    failed = sum(one.return_value is None for batch in batches for one in batch)
    if failed and _first():
        print(f"{failed} points of the sweep failed; the others are kept", file=sys.stderr)
    return 2 if failed else 0


def _for_slurm(app: App, config_dir: str | None) -> App:
    """The application, with submitit's folders where the nodes see them, if submitit is what starts the points and nothing else was typed."""
    if not any(one.hydra.startswith("hydra/launcher=submitit") for one in app.typed):
        return app
    typed = {word.partition("=")[0] for word in app.overrides}
    return App([*app.overrides, *(word for word in SHARED if word.partition("=")[0] not in typed)], config_dir)


def _first() -> bool:
    from lmforge.runtime.external import company

    peers = company()
    return peers is None or peers.first


def point(config: DictConfig) -> float | None:
    """One point of a sweep, in whichever process the launcher gives it; its value is the last step's main metric.

    A refusal is printed and gives None, so that one bad point does not end the others.
    """
    from lmforge.runtime.peers import Told
    from lmforge.runtime.summary import objective

    try:
        return objective(_execute(lambda: experiment(of_job(config))))
    except LmforgeError as error:
        print(error, file=sys.stderr)
        return None
    except Told as told:
        if told.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        return None
