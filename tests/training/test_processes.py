"""Runs in other processes: killed and run again, and on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file

import lmforge

SCRIPT = Path(tiny_run.__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(lmforge.__file__).parents[1])}


def test_killed_and_run_again_ends_in_the_same_weights(chat: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "killed", str(tmp_path), str(chat)], check=True, timeout=300, env=ENVIRONMENT, capture_output=True)
    assert (done.stdout, done.stderr) == (b"", b"")  # Lightning is quiet
    for dropout in (0.0, 0.2):
        _, undisturbed = tiny_run.train(tmp_path / "undisturbed", chat, dropout=dropout)
        resumed = tiny_run.state_in(tmp_path / f"dropout-{dropout}" / "state")
        assert resumed is not None
        assert resumed["step"] in (2, 3)  # the last state was being written
        _, weights = tiny_run.train(tmp_path / f"dropout-{dropout}", chat, dropout=dropout)
        assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())


def test_two_ranks_equal_one(chat: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), "ddp", str(tmp_path), str(chat)]
    subprocess.run(launch, check=True, timeout=500, env=ENVIRONMENT)
    report = tiny_run.Lines()
    _, weights = tiny_run.train(
        tmp_path / "one", chat, report=report, optimizer=tiny_run.adamw(eps=1e-5)
    )  # a larger eps: Adam blows up gradients that are but rounding
    results = json.loads((tmp_path / "results.json").read_text())
    for tolerance, name in ((1e-5, "fp32"), (2e-2, "bf16")):
        for ours, theirs in zip(report.logged, results[name]["logged"], strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=tolerance)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=tolerance * 5)
            assert theirs["tokens"] == ours["tokens"]
        for key, value in load_file(tmp_path / name / "final.safetensors").items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-5 if name == "fp32" else 3e-2)
    assert results["fp32"]["metrics"]["loss"] != results["bf16"]["metrics"]["loss"]  # the reduce dtype does something
    report = tiny_run.Lines()
    weights = tiny_run.train_kto(tmp_path / "kto", report)
    for ours, theirs in zip(report.logged, results["kto"]["logged"], strict=True):
        for name in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
        assert ours["kl"] > 1  # of one rank's answers it would be another
    for key, value in load_file(tmp_path / "kto.safetensors").items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-5)
