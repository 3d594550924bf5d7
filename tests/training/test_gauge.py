"""What a training is measured by: whole periods without the first, and a real fit's figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmforge.training.gauge import Gauge, Timed, resident_bytes
from tests.training import tiny_run

CPU = torch.device("cpu")


def test_the_first_step_is_not_timed_and_the_median_is_told() -> None:
    gauge = Gauge(CPU, 1)
    gauge.timed = [Timed(step, seconds, 100) for step, seconds in enumerate((0.2, 0.1, 9.0), start=1)]
    found = gauge.result()
    assert (found["step_seconds"], found["timed_steps"]) == (0.2, 3)
    assert found["tokens_per_second"] == pytest.approx(300 / 9.3)


def test_only_whole_periods_count() -> None:
    """Rollouts at steps 0, 4 and 8: the first period lacks its first step, the last its end."""
    gauge = Gauge(CPU, 4)
    gauge.timed = [Timed(step, 5.0 if step % 4 == 0 else 1.0, 10) for step in range(1, 10)]
    found = gauge.result()
    assert (found["step_seconds"], found["timed_steps"], found["tokens_per_second"]) == (2.0, 4, 5.0)


def test_ends_become_seconds_between_them() -> None:
    gauge = Gauge(CPU, 1)
    for step in range(3):
        gauge.end(step, 7)
        gauge.read()
    assert [(one.step, one.tokens) for one in gauge.timed] == [(1, 7), (2, 7)]
    assert all(one.seconds > 0 for one in gauge.timed)


def test_one_step_cannot_be_timed() -> None:
    gauge = Gauge(CPU, 1)
    gauge.end(0, 7)
    assert {name: gauge.result()[name] for name in ("step_seconds", "tokens_per_second", "timed_steps")} == {
        "step_seconds": None,
        "tokens_per_second": None,
        "timed_steps": 0,
    }


def test_a_fit_is_measured(chat: Path, tmp_path: Path) -> None:
    metrics, _ = tiny_run.train(tmp_path / "run", chat)
    found = metrics["measured"]
    assert found["timed_steps"] == metrics["steps"] - 1
    assert 0 < found["step_seconds"] < metrics["train_s"]
    assert found["tokens_per_second"] > 0
    assert 0 < found["resident_bytes"] <= resident_bytes()
    if not torch.cuda.is_available():
        assert (found["peak_bytes"], found["reserved_bytes"]) == (None, None)  # a CPU counts no tensors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_clock_is_the_devices_and_the_peak_its_allocators() -> None:
    gauge = Gauge(torch.device("cuda", 0), 1)
    for step in range(4):
        square = torch.randn(4096, 4096, device="cuda")
        (square @ square).sum()
        gauge.end(step, 1)
    found = gauge.result()
    assert found["timed_steps"] == 3
    assert found["step_seconds"] > 0
    assert 2 * 4096 * 4096 * 4 <= found["peak_bytes"] <= found["reserved_bytes"]
