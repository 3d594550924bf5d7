"""Stopped anywhere and typed again, a run goes on, and ends in the same weights as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.runtime.conftest import SMALL, Run

WORDS = (*SMALL, "stage=pretrain", "stage.pretrain.optimizer.global_batch_tokens=1024", "eval=none", "track=none", "stage.pretrain.log_every=5")
STEPS = 150


def words(corpus: Path) -> tuple[str, ...]:
    return (*WORDS, "data=text", f"data.path={corpus}", f"stage.pretrain.budget.steps={STEPS}", "stage.pretrain.save_every_s=0.2")


def start(corpus: Path, cwd: Path) -> subprocess.Popen[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "lmforge", *words(corpus)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_a_state(cwd: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(cwd.glob("outputs/steps/pretrain-*/state/index.json")):
        assert time.monotonic() < deadline, "no resumable state was written"
        time.sleep(0.02)


def final(cwd: Path) -> dict[str, torch.Tensor]:
    (file,) = cwd.glob("outputs/steps/pretrain-*/checkpoint/model.safetensors")
    return load_file(file)


def test_kill_9_and_ctrl_c_end_in_the_weights_of_an_undisturbed_run(corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    lmforge(*words(corpus), cwd=calm)
    first = start(corpus, killed)
    until_a_state(killed)
    first.kill()
    first.wait()
    assert "partial" in lmforge("plan", *words(corpus), cwd=killed).stdout
    second = start(corpus, killed)
    time.sleep(0.1)
    index = next(killed.glob("outputs/steps/pretrain-*/state/index.json"))
    before = index.stat().st_mtime_ns
    deadline = time.monotonic() + 120
    while index.exists() and index.stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.02)
    second.send_signal(signal.SIGINT)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 130, said
    assert "type the same again to go on" in said
    lmforge(*words(corpus), cwd=killed)
    undisturbed, resumed = final(calm), final(killed)
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    lines = next(killed.glob("outputs/steps/pretrain-*/metrics.jsonl")).read_text().splitlines()
    assert len(lines) == STEPS // 5  # no interval is missing and none is there twice
