"""How a plan is started on the ranks it wants: torchrun's line, and what sbatch reads. Text only; no torch."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

from lmforge.plan import Plan
from lmforge.runtime.given import fits

PER_NODE = 8  # GPUs of a node: DGX, HGX and every cloud's eight-GPU machine
PORT = 29500  # torch's own default for a rendezvous
QUEUE_S = 60  # for the queue to answer, after the grace time of the ranks; Slurm may be a minute early on top of it


def launches(plan: Plan, overrides: Sequence[str]) -> str:
    """All the ways to start the plan that need more than `python -m lmforge`. PlanError where its steps want ranks in different numbers."""
    devices = widest(plan)
    if devices == 1:
        return f"one device, one process:\n\n{_own(plan, overrides)}"
    where = "one node" if devices <= PER_NODE else f"every one of {shape(devices)[0]} nodes, the first of them named in HEAD"
    blocks = [f"torchrun, on {where}:\n\n{torchrun(plan, overrides)}", f"Slurm, as job.sh for sbatch job.sh:\n\n{sbatch(plan, overrides)}"]
    if devices <= PER_NODE:
        blocks.insert(0, f"by itself, on one node:\n\n{_own(plan, overrides)}")
    return "\n\n".join(blocks)


def hint(plan: Plan) -> str:
    """What a plain plan says of it in a line; '' where there is nothing to know."""
    devices = widest(plan)
    return f"launch on {devices} devices: plan --launch shows the torchrun line and the sbatch text" if devices > 1 else ""


def torchrun(plan: Plan, overrides: Sequence[str]) -> str:
    """The line to type on one node; for more than PER_NODE devices on each of several, where HEAD is the first one's name."""
    nodes, each = shape(_agreed(plan))
    if nodes == 1:
        meet = "--standalone"
    else:
        meet = f'--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint "$HEAD:{PORT}" --rdzv-id {plan.experiment.name}'
    return f"torchrun {meet} --nproc-per-node {each} -m lmforge {shlex.join(_words(plan, overrides))}"


def sbatch(plan: Plan, overrides: Sequence[str]) -> str:
    """A job for Slurm: one task a GPU, warned before its end, back in the queue after that or a lost node, its log kept.

    A task whose own process is killed can tell nobody, so srun ends the others.
    """
    from lmforge.runtime.launch import grace  # a plain plan starts no ranks

    nodes, each = shape(_agreed(plan))
    options = [
        f"--job-name={plan.experiment.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={each}",
        *([f"--gpus-per-node={each}"] if plan.experiment.hardware.machine().accelerator == "cuda" else []),
        "--requeue",
        f"--signal=TERM@{math.ceil(max(map(grace, plan.steps))) + QUEUE_S}",  # before the time limit
        "--open-mode=append",
    ]
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {one}" for one in options), f"srun --kill-on-bad-exit=1 {_own(plan, overrides)}"])


def widest(plan: Plan) -> int:
    """The most devices that a step uses."""
    return max((step.placement.devices for step in plan.steps), default=1)


def shape(devices: int) -> tuple[int, int]:
    """The fewest nodes that carry them evenly, and how many each carries."""
    nodes = next(count for count in range(-(-devices // PER_NODE), devices + 1) if devices % count == 0)
    return nodes, devices // nodes


def _agreed(plan: Plan) -> int:
    """The number of ranks, which every step on more than one device has to share."""
    devices = widest(plan)
    fits(plan.steps, devices)
    return devices


def _own(plan: Plan, overrides: Sequence[str]) -> str:
    return f"python -m lmforge {shlex.join(_words(plan, overrides))}"


def _words(plan: Plan, overrides: Sequence[str]) -> list[str]:
    """The overrides without the machine that the plan was made for: where it runs, that machine is `here`."""
    kept = [word for word in overrides if re.split(r"[.=]", word.lstrip("+~"), maxsplit=1)[0] != "hardware"]
    return kept if plan.experiment.hardware.type == "here" else [*kept, "hardware=here"]  # an experiment's file may name one too
