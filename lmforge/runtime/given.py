"""Which rank this process was given, if any: by torchrun (RANK, WORLD_SIZE), or by srun (SLURM_PROCID, SLURM_NTASKS). No torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmforge.errors import PlanError, Problem, RunError
from lmforge.experiment import Experiment
from lmforge.hardware.nodes import Stated
from lmforge.plan import Step

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MORE = ("GROUP_RANK", "GROUP_WORLD_SIZE", "GROUP_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "TORCHELASTIC_")


@dataclass(frozen=True)
class Given:
    """A place among processes that somebody else started."""

    by: str  # torchrun or srun
    rank: int
    world: int
    local: int  # this rank's number on its machine
    local_world: int
    node: int
    address: str  # of rank 0's machine; '' = to be read off Slurm's list of nodes
    port: int
    kept: bool  # whether the starter keeps a store there already, as torchrun does
    launch: str  # tells this start from an earlier one of the same job


def given() -> Given | None:
    """This process's place; None where it is alone. RunError where the variables do not fit together."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return of_torchrun(os.environ)
    return of_slurm(os.environ) if _is_task(os.environ) else None


def of_torchrun(environment: Mapping[str, str]) -> Given:
    """The place that torchrun's variables tell."""
    missing = [name for name in TORCHRUN if name not in environment]
    if missing:
        raise RunError("RANK", f"is set, but {', '.join(missing)} is not", "start with torchrun, or unset RANK and WORLD_SIZE")
    rank, world, local, local_world, port = (_number(environment, name) for name in TORCHRUN if name != "MASTER_ADDR")
    kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    launch = f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    node = int(environment.get("GROUP_RANK", rank // local_world))
    return Given("torchrun", rank, world, local, local_world, node, environment["MASTER_ADDR"], port, kept, launch)


def _is_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this as one task of several.

    Not in the batch script itself, which has SLURM_PROCID=0 but no SLURM_STEP_ID, and not where a person works in the allocation by
    hand: Lightning's rule, by the name of the job.
    """
    if "SLURM_PROCID" not in environment or int(environment.get("SLURM_NTASKS", "1")) < 2:
        return False
    script = environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment
    return not script and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def of_slurm(environment: Mapping[str, str]) -> Given:
    """The place that Slurm's variables tell. The port follows from the job's number, by Lightning's rule, where MASTER_PORT gives none."""
    rank, world, local = (_number(environment, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    local_world = int(environment.get("SLURM_NTASKS_PER_NODE") or world // nodes)
    if local_world * nodes != world:
        raise RunError("SLURM_NTASKS", f"{world} tasks do not lie evenly on {nodes} nodes", "ask for them with --ntasks-per-node")
    job = environment.get("SLURM_JOB_ID", "")
    port = int(environment.get("MASTER_PORT") or (15000 + int(job[-4:]) if job else 12910))
    launch = f"{job}/{environment.get('SLURM_STEP_ID', '0')}/{environment.get('SLURM_RESTART_COUNT', '0')}"
    node = int(environment.get("SLURM_NODEID", rank // local_world))
    return Given("srun", rank, world, local, local_world, node, environment.get("MASTER_ADDR", ""), port, False, launch)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise RunError(name, f"{text!r} is not a number of a rank" if text else "is not set", "start with torchrun or srun")
    return int(text)


def forget() -> None:
    """Take torchrun's variables away: from here on a step on one device, and the libraries it uses, must not take themselves for a rank."""
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith(MORE):
            del os.environ[name]


def across(experiment: Experiment, world: int, local_world: int) -> Experiment:
    """The same on the machine that the given ranks make up: `hardware=here` sees one node, and no more than that. PlanError for another.

    A device is a rank here, so that `parallel.devices=null` takes them all.
    """
    hardware = experiment.hardware
    machine, nodes = hardware.machine(), world // local_world
    if hardware.type != "here":
        raise PlanError.of([described(machine.name)])
    name = f"{nodes} x {machine.name}" if nodes > 1 else machine.name
    memory = machine.memory_bytes * (nodes if machine.accelerator == "cpu" else 1)  # a GPU's own, or that of all hosts
    bandwidth = machine.memory_bandwidth and machine.memory_bandwidth * (nodes if machine.accelerator == "cpu" else 1)
    figures = hardware.figures() | {"memory_bandwidth": bandwidth}
    spread = Stated(
        name=name, accelerator=machine.accelerator, devices=world, devices_per_node=local_world, memory_bytes=memory, **figures
    )  # fmt: skip
    return dataclasses.replace(experiment, hardware=spread)


def described(name: str) -> Problem:
    """A machine that is not the one at hand can be planned for only."""
    return Problem("hardware", f"{name} is described, not this machine", "use plan for it; run with hardware=here")


def fits(steps: Sequence[Step], world: int) -> None:
    """Refuse steps that want neither one device nor all of the ranks there are."""
    problems = []
    for step in steps:
        devices = step.placement.devices
        if devices not in (1, world):
            what = f"placed on {devices} devices, but there are {world} ranks for every step on more than one"
            problems.append(Problem(f"stage.{step.name}.parallel", what, f"type parallel.devices={world}, or start {devices} ranks"))
    if problems:
        raise PlanError.of(problems)
