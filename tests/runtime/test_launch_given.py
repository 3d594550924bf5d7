"""Ranks that are given: by torchrun itself, and by Slurm as far as its variables and its commands go."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lmforge.plan import Plan
from lmforge.runtime.stopping import Asked, requeue
from tests.runtime.conftest import Run
from tests.runtime.test_interrupt import WORDS, final, until_a_state
from tests.runtime.test_ranks import ranks

SCONTROL = '#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n'


@pytest.fixture
def words(corpus: Path) -> tuple[str, ...]:
    return (*WORDS, "data=text", f"data.path={corpus}", "stage.pretrain.save_every_s=0.2")


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"} | more


def tasks(folder: Path, *typed: tuple[str, ...], apart: bool = False, **more: str) -> list[subprocess.Popen[str]]:
    """What srun would start: one task on each of as many nodes as there are command lines, all of them this one; a scontrol lies on their path."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/scontrol").write_text(SCONTROL)
    (folder / "bin/scontrol").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = str(len(typed))
    shared = {"SLURM_NTASKS": world, "SLURM_NNODES": world, "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "MASTER_PORT": port}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "lmforge", *one],
            cwd=folder / str(rank) if apart else folder,
            env=environment(PATH=path, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank), SLURM_LOCALID="0", **shared, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank, one in enumerate(typed)
    ]


def ends(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    said = [one.communicate(timeout=300) for one in started]
    return [(one.returncode, *texts) for one, texts in zip(started, said, strict=True)]


def test_torchrun_gives_the_ranks(words: tuple[str, ...], lmforge: Run, tmp_path: Path) -> None:
    typed = (*words, "stage.pretrain.budget.steps=4", "parallel=ddp")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lmforge"]
    done = subprocess.run([*start, *typed], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("16 rows = 2 data-parallel ranks x 8 rows x 1 accumulated") == 1  # one process prints, and the ranks are all devices
    assert done.stdout.count("s in all") == 1
    alone = tmp_path / "alone"
    alone.mkdir()
    lmforge(*typed, "parallel.devices=2", cwd=alone)
    given, own = final(tmp_path), final(alone)
    assert all(torch.equal(given[name], own[name]) for name in given)

    refused = subprocess.run(
        [*start, *typed, "stage.pretrain.budget.steps=5", "data.path=nowhere"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    ours = [line for line in refused.stderr.splitlines() if " error: " in line and "nowhere" in line]
    assert len(ours) == 1, refused.stderr
    assert refused.returncode != 0


def test_slurm_ranks_that_do_not_fit_together_are_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    typed = (*words, "stage.pretrain.budget.steps=4", "parallel=ddp", "data.path=rows")
    for rank in (0, 1):  # each node has its own rows, of which one differs
        (tmp_path / str(rank) / "rows").mkdir(parents=True)
        (tmp_path / str(rank) / "rows/text.jsonl").write_text(json.dumps({"text": f"row {rank}"}) + "\n")
    (first, said, error), (second, silent, nothing) = ends(tasks(tmp_path, typed, typed, apart=True))
    assert (first, second) == (2, 2)
    what = r"its plan is another one: it has [0-9a-f]{16} for data, rank 0 has [0-9a-f]{16}"
    assert re.fullmatch(rf"run error: rank 1 \(\S+\): {what}; start every rank with the same words, the same lmforge and the same data\n", error)
    assert (said, silent, nothing) == ("", "", "")

    (_, _, error), (second, _, nothing) = ends(tasks(tmp_path, (*words, "seed=1"), (*words, "seed=2")))
    assert "for the command line, rank 0 has" in error
    assert (second, nothing) == (2, "")

    few = (*words, "stage.pretrain.budget.steps=4", "parallel=ddp", "parallel.devices=2")
    refused = ends(tasks(tmp_path, few, few, few))
    assert [code for code, _, _ in refused] == [2, 2, 2]
    assert "".join(text for _, _, text in refused) == (
        "plan error: stage.pretrain.parallel: placed on 2 devices, but there are 3 ranks for every step on more than one; "
        "type parallel.devices=3, or start 2 ranks\n"
    )
    assert not (tmp_path / "outputs").exists()


def test_a_preempted_slurm_job_is_requeued_and_goes_on(words: tuple[str, ...], tmp_path: Path) -> None:
    typed = (*words, "stage.pretrain.budget.steps=120", "parallel=ddp", "parallel.max_restarts=1")
    started = tasks(tmp_path, typed, typed, SLURM_RESTART_COUNT="0")
    until_a_state(tmp_path)
    for task in started:  # Slurm signals every task of a step
        task.send_signal(signal.SIGTERM)
    (first, said, _), (second, silent, nothing) = ends(started)
    assert (first, second) == (130, 130)
    assert "job 4711 is requeued (restart 1 of 1) and goes on from the last state" in said
    assert (silent, nothing) == ("", "")
    assert (tmp_path / "bin/asked").read_text() == "requeue 4711\n"
    (index,) = tmp_path.glob("outputs/steps/pretrain-*/state/index.json")
    done = int(json.loads(index.read_text())["step"])
    assert 0 < done < 120
    (first, said, _), (second, *_) = ends(tasks(tmp_path, typed, typed, SLURM_RESTART_COUNT="1"))
    assert (first, second) == (0, 0)
    assert "partial (goes on from its last state)" in said
    (lines,) = tmp_path.glob("outputs/steps/pretrain-*/metrics.jsonl")
    assert len(lines.read_text().splitlines()) == 120 // 5  # no interval is missing and none is there twice
    assert final(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads processes from /proc")
def test_ranks_that_the_schedulers_own_signal_ends_are_no_failure(words: tuple[str, ...], tmp_path: Path) -> None:
    """Slurm sends SIGTERM to every process of a job, to ranks that are still importing what would take it too."""
    typed = (*words, "stage.pretrain.budget.steps=4", "parallel=ddp", "parallel.max_restarts=1")
    started = tasks(tmp_path, typed, typed)
    deadline = time.monotonic() + 120
    while len(at_work := ranks(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in at_work:
        os.kill(rank, signal.SIGTERM)
    time.sleep(1.0)  # the ranks have ended, as their processes see, and the signal comes to those only now
    for task in started:
        task.send_signal(signal.SIGTERM)
    (first, said, error), (second, silent, nothing) = ends(started)
    assert (first, second) == (130, 130), error
    assert "job 4711 is requeued (restart 1 of 1)" in said
    assert "restart 1 of 1, from" not in said
    assert (silent, nothing) == ("", "")


def test_a_job_goes_back_into_the_queue_as_often_as_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan_of: Callable[..., Plan]) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    plan = plan_of("stage=pretrain", "parallel.max_restarts=2")
    console = Console(file=io.StringIO(), width=200)

    def asked(*numbers: int, **more: str) -> str:
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        with Asked() as signals:
            for number in numbers:
                before = signal.signal(number, lambda *_: None)
                os.kill(os.getpid(), number)
                signal.signal(number, before)
            requeue(plan, signals, console)
        log = tmp_path / "asked"
        said = log.read_text() if log.is_file() else ""
        log.unlink(missing_ok=True)
        return said

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert asked(signal.SIGTERM) == ""  # not under Slurm
    assert asked(signal.SIGTERM, SLURM_JOB_ID="9") == "requeue 9\n"
    assert asked(signal.SIGINT, signal.SIGTERM) == ""  # a person's Ctrl-C
    assert asked(signal.SIGTERM, SLURM_RESTART_COUNT="1", SLURM_ARRAY_JOB_ID="8", SLURM_ARRAY_TASK_ID="3") == "requeue 8_3\n"
    assert asked(signal.SIGTERM, SLURM_RESTART_COUNT="2") == ""
    assert "not requeued (parallel.max_restarts=2)" in console.file.getvalue()  # type: ignore[attr-defined]
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Invalid job >&2\nexit 1\n")
    asked(signal.SIGTERM, SLURM_RESTART_COUNT="0")
    assert "job 8_3: not requeued: Invalid job" in console.file.getvalue()  # type: ignore[attr-defined]
