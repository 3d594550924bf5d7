"""Which rank a process was given, and the text that starts ranks elsewhere. No process is started here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lmforge.compiler import compile
from lmforge.compose import experiment
from lmforge.errors import PlanError, RunError
from lmforge.plan import Plan
from lmforge.runtime.given import Given, across, fits, given, of_slurm, of_torchrun
from lmforge.runtime.ranks import Crash, Outcome, cause, packed
from lmforge.runtime.submission import launches, shape
from lmforge.verbs._arguments import app_of

DATA = ("stage=pretrain", "data=text", "data.path=text", "eval=none")
ELASTIC = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29500", "GROUP_RANK": "1"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """On eight described GPUs."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/rows.jsonl").write_text('{"text": "a row"}\n')
    monkeypatch.chdir(tmp_path)
    return planned("parallel=fsdp", "hardware=h100x8")


def planned(*words: str) -> Plan:
    app, _ = app_of([*DATA, *words])
    return compile(experiment(app.compose()))


def on(plan: Plan, devices: int) -> Plan:
    """The plan with its training step on so many devices."""
    steps = (dataclasses.replace(one, placement=dataclasses.replace(one.placement, devices=devices)) if one.name == "pretrain" else one for one in plan.steps)
    return dataclasses.replace(plan, steps=tuple(steps))


ONE_NODE = """\
by itself, on one node:

python -m lmforge stage=pretrain 'stage=[pretrain, sft]' parallel=fsdp hardware=here

torchrun, on one node:

torchrun --standalone --nproc-per-node 8 -m lmforge stage=pretrain 'stage=[pretrain, sft]' parallel=fsdp hardware=here

Slurm, as job.sh for sbatch job.sh:

#!/bin/bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
srun --kill-on-bad-exit=1 python -m lmforge stage=pretrain 'stage=[pretrain, sft]' parallel=fsdp hardware=here"""

MANY_NODES = """\
torchrun, on every one of 64 nodes, the first of them named in HEAD:

torchrun --nnodes 64 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id pretrain --nproc-per-node 8 -m lmforge parallel=fsdp hardware=here

Slurm, as job.sh for sbatch job.sh:

#!/bin/bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
srun --kill-on-bad-exit=1 python -m lmforge parallel=fsdp hardware=here"""


def test_what_starts_a_plan_on_one_node(plan: Plan) -> None:
    words = ["stage=pretrain", "stage=[pretrain, sft]", "parallel=fsdp", "hardware=h100x8", "hardware.devices=8"]
    assert launches(plan, words) == ONE_NODE


def test_what_starts_a_plan_on_64_nodes(plan: Plan) -> None:
    assert launches(on(plan, 512), ["parallel=fsdp", "++hardware.devices=512"]) == MANY_NODES


def test_what_starts_a_plan_on_one_device(plan: Plan) -> None:
    assert launches(on(plan, 1), ["stage=pretrain"]) == "one device, one process:\n\npython -m lmforge stage=pretrain hardware=here"


def test_a_job_on_processors_asks_for_no_gpu(plan: Plan) -> None:
    assert "gpus" in launches(plan, [])
    assert "gpus" not in launches(on(planned("hardware=cpu"), 2), [])


def test_a_job_is_warned_as_early_as_its_ranks_need(plan: Plan) -> None:
    assert "#SBATCH --signal=TERM@361\n" in launches(planned("parallel=fsdp", "hardware=h100x8", "parallel.grace_s=300.5"), [])


def test_nodes_carry_the_same_number_of_ranks() -> None:
    assert [shape(devices) for devices in (2, 8, 9, 12, 16, 17, 20)] == [(1, 2), (1, 8), (3, 3), (2, 6), (2, 8), (17, 1), (4, 5)]


def test_steps_on_two_numbers_of_devices_are_refused_with_both(plan: Plan) -> None:
    fits(plan.steps, 8)
    with pytest.raises(PlanError) as refused:
        fits(plan.steps, 6)
    assert str(refused.value) == (
        "plan error: stage.pretrain.parallel: placed on 8 devices, but there are 6 ranks for every step on more than one; "
        "type parallel.devices=6, or start 8 ranks"
    )


def test_places_that_torchrun_and_slurm_give() -> None:
    assert of_torchrun(ELASTIC) == Given("torchrun", 3, 4, 1, 2, 1, "head", 29500, False, "/0")
    assert of_slurm(SLURM) == Given("srun", 3, 4, 1, 2, 1, "", 15000 + 3456, False, "123456/0/0")
    again = of_slurm(SLURM | {"SLURM_RESTART_COUNT": "2"})
    assert again.launch == "123456/0/2"  # keys of the start before are nobody's
    with pytest.raises(RunError, match="MASTER_PORT is not"):
        of_torchrun({name: value for name, value in ELASTIC.items() if name != "MASTER_PORT"})
    with pytest.raises(RunError, match="5 tasks do not lie evenly on 2 nodes"):
        of_slurm(SLURM | {"SLURM_NTASKS": "5"})


@pytest.mark.parametrize(
    ("change", "taken"),
    [({}, True), ({"SLURM_NTASKS": "1"}, False), ({"SLURM_JOB_NAME": "bash"}, False), ({"SLURM_STEP_ID": "", "ENVIRONMENT": "BATCH"}, False)],
    ids=["task", "alone", "by hand", "the batch script"],
)
def test_only_a_task_among_several_is_a_rank(change: dict[str, str], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (SLURM | change).items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    assert (given() is not None) == taken


def test_given_ranks_are_the_machine(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = app_of([*DATA, "parallel=ddp"])
    here = experiment(app.compose())
    wide = across(here, 16, 8)
    assert wide.hardware.machine().devices == 16
    assert wide.hardware.machine().name == f"2 x {here.hardware.machine().name}"
    assert compile(wide).step("pretrain").placement.devices == 16
    assert compile(wide).step("pretrain").digest == compile(here).step("pretrain").digest
    with pytest.raises(PlanError, match="is described, not this machine"):
        across(plan.experiment, 16, 8)


def test_the_message_is_the_first_failing_ranks_own() -> None:
    lost = {"exception": "RuntimeError", "text": "[gloo/transport/tcp/pair.cc] Connection closed by peer", "lost": True}
    ours = Outcome(1, 2, 11.0, "1.log", packed(RunError("rows.jsonl:7", "is not a row", "mend it")))
    after = [Outcome(0, 1, 10.0, "0.log", lost), Outcome(2, -6, 10.5, "2.log")]  # seen to end before the one they follow from
    assert str(cause([*after, ours]).error("pretrain")) == "run error: rows.jsonl:7: is not a row (on rank 1); mend it"
    killed = cause([*after, Outcome(1, -9, 11.0, "1.log")]).error("pretrain")
    assert isinstance(killed, Crash)
    assert str(killed) == "run error: pretrain: rank 1 was killed (signal 9): usually out of memory; its output is in 1.log"
    assert cause([Outcome(0, 0, 1.0, ""), Outcome(1, 130, 1.0, "")]) is None
