"""Schedules against values worked out by hand and torch's own cosine."""

from __future__ import annotations

import math

import pytest
import torch

from lmforge.codec import decode
from lmforge.errors import ConfigError
from lmforge.optimizer.schedule import Constant, Cosine, Linear, Schedule, Wsd


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        (Constant(warmup=0.0), {0: 1.0, 99: 1.0}),
        (Constant(warmup=0.04), {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 99: 1.0}),
        (Linear(warmup=0.0, final=0.0), {0: 1.0, 50: 0.5, 99: 0.01}),
        (Linear(warmup=0.2, final=0.1), {0: 1 / 21, 20: 1.0, 60: 0.55}),
        (Cosine(warmup=0.0, final=0.1), {0: 1.0, 50: 0.55, 25: 0.1 + 0.9 * (0.5 + math.sqrt(0.125))}),
        (Wsd(warmup=0.1, final=0.0, decay=0.2), {10: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
        (Wsd(warmup=0.0, final=0.5, decay=1.0), {0: 1.0, 50: 0.75}),
        (Wsd(warmup=0.0, final=0.5, decay=0.0), {0: 1.0, 99: 1.0}),
        (Linear(warmup=1.0, final=0.0), {0: 1 / 101, 99: 100 / 101}),
    ],
)
def test_known_points(schedule: Schedule, at: dict[int, float]) -> None:
    assert {step: schedule.factor(step, 100) for step in at} == pytest.approx(at)


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=37, eta_min=0.2)
    ours = Cosine(warmup=0.0, final=0.2)
    for step in range(37):
        assert ours.factor(step, 37) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_every_step_of_a_short_run_has_a_factor() -> None:
    for schedule in (Constant(warmup=0.5), Linear(warmup=0.3, final=0.0), Cosine(warmup=0.9, final=0.0), Wsd(warmup=0.3, final=0.0, decay=0.7)):
        for steps in range(1, 12):
            assert all(0 < schedule.factor(step, steps) <= 1 for step in range(steps))
    with pytest.raises(ValueError, match="step 5 is not in"):
        Constant(warmup=0.0).factor(5, 5)


def test_wsd_refuses_more_than_all_steps() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.schedule.decay: warmup 0.5 \+ decay 0.6"):
        decode(Schedule, {"type": "wsd", "warmup": 0.5, "final": 0.0, "decay": 0.6}, "optimizer.schedule")
