"""Ranks that somebody else started (torchrun, srun): every process compiles the same plan, the first drives, the others hold its ranks."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from typing import Any

from rich.console import Console

from lmforge.errors import LmforgeError
from lmforge.plan import Plan
from lmforge.runtime.given import forget, given
from lmforge.runtime.peers import Peers
from lmforge.runtime.ranks import FAILED, INTERRUPTED, REFUSED
from lmforge.runtime.runner import run
from lmforge.runtime.workspace import Workspace


@functools.cache
def company() -> Peers | None:
    """The processes that this one was started among, once for its whole life; None where it is alone."""
    place = given()
    if place is None:
        return None
    forget()
    peers = Peers(place, place.address or _root_of_slurm())
    if peers.first:
        atexit.register(peers.be_silent)  # then errors are printed, whoever does that
    return peers


def together(peers: Peers, make: Callable[[], Plan], console: Console) -> dict[str, Any]:
    """One plan on all ranks, this process's part of it; the metrics of each step. Told on all but the first where it did not end well."""
    plan = peers.agree(make, lambda one: {step.name: step.digest for step in one.steps})
    if not peers.first:
        peers.serve()
        workspace = Workspace(plan.experiment.output)
        return {step.name: workspace.record(step)["metrics"] for step in plan.steps}
    code = FAILED
    try:
        metrics = run(plan, console, peers)
        code = 0
    except LmforgeError:
        code = REFUSED
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        peers.end(code)
    return metrics


def _root_of_slurm() -> str:
    """The first of the allocation's nodes, as Lightning reads Slurm's list of them."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment.resolve_root_node_address(os.environ.get("SLURM_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1")
