"""A job on two ranks: they end with their launcher, stop together on Ctrl-C, and end in the weights of a run that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runtime.conftest import Run
from tests.runtime.test_interrupt import final, until_a_state, words

STEPS = 400  # enough to be stopped in the middle of, on a fast machine too
# No step is an interval's end, so that ranks which agreed there alone would never stop.
RANKS = ("parallel=ddp", "parallel.devices=2", f"stage.pretrain.budget.steps={STEPS}", "stage.pretrain.log_every=100000")
END_S = 5.0


def start(corpus: Path, cwd: Path) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell starts it, so that a Ctrl-C of the terminal can be sent."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lmforge", *words(corpus), *RANKS]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def ranks(cwd: Path) -> list[int]:
    """The ranks at work on steps under `cwd`, by what the kernel says of every process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (entry / "cmdline").read_bytes(), (entry / "stat").read_text().rpartition(")")[2].split()[0]
            at_work = (entry / "cwd").resolve() == cwd.resolve()
        except OSError:
            continue  # it ended meanwhile
        if b"lmforge.runtime.worker" in command and at_work and state != "Z":
            found.append(int(entry.name))
    return found


def gone(cwd: Path, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while ranks(cwd) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not ranks(cwd)


def step_of_state(cwd: Path) -> int:
    (index,) = cwd.glob("outputs/steps/pretrain-*/state/index.json")
    return int(json.loads(index.read_text())["step"])


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads processes from /proc")
def test_ranks_end_with_their_launcher_and_stop_with_ctrl_c(corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    lmforge(*words(corpus), *RANKS, cwd=calm)
    first = start(corpus, killed)
    until_a_state(killed)
    assert len(ranks(killed)) == 2
    first.kill()
    assert gone(killed, END_S), "ranks outlived their launcher"
    first.communicate()
    before = step_of_state(killed)
    assert before < STEPS

    second = start(corpus, killed)
    deadline = time.monotonic() + 120
    while step_of_state(killed) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(second.pid, signal.SIGINT)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 130, said
    assert "type the same again to go on" in said
    assert not ranks(killed)
    assert before < step_of_state(killed) < STEPS
    assert not list(killed.glob("outputs/steps/pretrain-*/checkpoint/*.safetensors")), "ranks went on to the end"

    lmforge(*words(corpus), *RANKS, cwd=killed)
    undisturbed, resumed = final(calm), final(killed)
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
