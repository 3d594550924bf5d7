"""Which steps are skipped: the rule by hand. Real runs are in test_guard_runs.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch

from lmforge.errors import RunError
from lmforge.training.guard import Guard, exceeds

NAN, INFINITE = float("nan"), float("inf")


def rows() -> Iterable[int]:
    return [4, 7]


def never() -> Iterable[int]:
    raise AssertionError("asked for the rows of a step that is taken")


def test_the_rule_by_hand() -> None:
    """2, 4, 4, 4, 5, 5, 7, 9 have the mean 5 and the squared differences 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, so the sample deviation is sqrt(32 / 7)."""
    window = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]
    limit = 5 + 2 * math.sqrt(32 / 7)
    assert not exceeds(limit - 1e-9, window, 2.0)
    assert exceeds(limit + 1e-9, window, 2.0)
    assert not exceeds(-100.0, window, 2.0)  # a loss that drops is no harm
    assert not exceeds(100.0, [0.1] * 8, 2.0)  # no spread, no judgement
    deviation, mean = torch.std_mean(torch.tensor(window, dtype=torch.float64))  # OLMo-core's own expression
    assert limit == pytest.approx(float(mean + 2 * deviation), rel=1e-15)


@pytest.mark.parametrize(("window", "least"), [(128, 64), (60, 30), (24, 20), (8, 8), (2, 2)])
def test_no_spike_is_judged_before_there_is_a_spread(window: int, least: int) -> None:
    for accepted, judged in ((least - 1, False), (least, True)):
        guard = Guard(3.0, window, 100)
        for step in range(accepted):
            assert not guard.skips(step, 1.0 + step % 2, 1.0, never)
        assert guard.skips(accepted, 50.0, 1.0, rows) is judged
        assert guard.skips(accepted + 1, NAN, 1.0, rows)  # this needs no spread


@pytest.mark.parametrize(("loss", "norm"), [(9.0, 1.0), (1.0, 9.0), (NAN, 1.0), (1.0, INFINITE), (-INFINITE, 1.0)])
def test_what_is_skipped_never_enters_the_window(loss: float, norm: float) -> None:
    guard, told = Guard(3.0, 8, 100), list[Mapping[str, Any]]()
    for step in range(8):
        guard.skips(step, 1.0 + step % 2, 1.0 + step % 2, never)
    before = guard.state_dict()
    for step in range(8, 40):  # as often as it comes: it never becomes the custom
        assert guard.skips(step, loss, norm, rows, told.append)
    after = guard.state_dict()
    assert (after["losses"], after["norms"]) == (before["losses"], before["norms"])
    assert told[-1].keys() == {"skipped/step", "skipped/loss", "skipped/grad_norm", "skipped/count", "skipped/rows"}
    assert (told[-1]["skipped/step"], told[-1]["skipped/count"], told[-1]["skipped/rows"]) == (39, 32, [4, 7])


def test_without_sigma_only_what_is_not_finite_is_skipped() -> None:
    guard = Guard(None, 4, 1)
    assert not any(guard.skips(step, 10.0**step, 1.0, never) for step in range(30))
    assert guard.skips(30, 1.0, NAN, rows)


def test_the_window_is_of_the_last_accepted_steps() -> None:
    guard = Guard(3.0, 4, 100)
    for step in range(4):
        guard.skips(step, 100.0 + step % 2, 1.0, never)
    for step in range(4, 8):  # these push the first four out
        assert not guard.skips(step, 1.0 + step % 2, 1.0, never)
    assert guard.skips(8, 100.0, 1.0, rows)


def test_an_overflow_under_a_loss_scale_is_not_counted() -> None:
    guard = Guard(3.0, 8, 1)
    for step in range(50):
        assert not guard.skips(step, 1.0, INFINITE, never, overflowed=True)
    assert guard.state_dict() == Guard(3.0, 8, 1).state_dict()
    assert guard.skips(50, NAN, INFINITE, rows, overflowed=True)  # no scale mends a loss


def test_one_too_many_is_told_and_stops_with_one_line() -> None:
    guard, told = Guard(None, 8, 7), list[Mapping[str, Any]]()
    for step in range(7):
        guard.skips(step, NAN, 0.5, rows, told.append)
    with pytest.raises(RunError) as caught:
        guard.skips(7, INFINITE, 0.25, lambda: range(100), told.append)
    line = str(caught.value)
    assert len(told) == 8
    assert told[-1]["skipped/rows"] == list(range(100))
    assert "\n" not in line
    assert line.startswith("run error: optimizer.max_skips: 8 steps had to be skipped, 7 may be: step 3 (not finite: loss nan, gradient norm 0.5), step 4 ")
    assert "step 7 (not finite: loss inf, gradient norm 0.25) and 3 before; look at rows 0 1 2 " in line
    assert " 63 and 36 more of the last one" in line


def test_a_restored_guard_decides_as_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2, generator=generator, dtype=torch.float64).exp()  # long-tailed: many spikes
    noise[::37] = NAN
    whole, decided, restored = Guard(4.0, 32, 400), [], []
    for step, (loss, norm) in enumerate(noise.tolist()):
        decided.append(whole.skips(step, loss, norm, rows))
    part = Guard(4.0, 32, 400)
    for step, (loss, norm) in enumerate(noise.tolist()):
        if step % 7 == 3:
            text = json.dumps(part.state_dict(), allow_nan=False)
            part = Guard(4.0, 32, 400)
            part.load_state_dict(json.loads(text))
        restored.append(part.skips(step, loss, norm, rows))
    assert restored == decided
    spikes = [step for step, one in enumerate(decided) if one and step % 37]
    assert len(spikes) > 10
    assert sum(decided) < 100
    assert part.state_dict() == whole.state_dict()
