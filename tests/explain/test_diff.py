"""What a change costs: differences with units and shares, of a step and of a whole plan, and what nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmforge.explain.diff import change, diff
from lmforge.explain.words import columns, count, duration, gib, plain, short
from lmforge.plan import Plan

PlanOf = Callable[..., Plan]


def test_a_change_has_its_difference_and_its_share() -> None:
    assert change("memory", 12 * 2**30, 15 * 2**30, gib) == "memory: 12.0 GiB -> 15.0 GiB (+3.0 GiB, +25 %)"
    assert change("time", 7200.0, 5400.0, duration) == "time: 2 h -> 90 min (-30 min, -25 %)"
    assert change("tokens", 0, 5, count) == "tokens: 0 -> 5 (+5)"
    assert change("tokens", None, 5, count) == "tokens: - -> 5"
    assert change("tokens", 5, None, count) == "tokens: 5 -> -"
    assert change("tokens", 5, 5, count) == change("tokens", None, None, count) == ""


def test_figures_read_well() -> None:
    assert [duration(one) for one in (0, 3e-6, 0.0021, 1.5, 119, 120, 7200, 86400 * 3)] == ["0 s", "3 us", "2.1 ms", "1.5 s", "119 s", "2 min", "2 h", "3 days"]
    assert [plain(one) for one in (0.3344, 12.0, 1234.5, 17_801, 5.88e21)] == ["0.3344", "12", "1,234", "17,801", "5.88e+21"]
    assert [short(one) for one in (999, 1.5e3, 140e9, 1.4e12)] == ["999", "1.5k", "140B", "1.4T"]
    assert list(columns(("a", "bb"), [("x", "1")])) == ["a  bb", "x   1"]


def test_memory_says_which_parts_changed(plan_of: PlanOf, rows: Path) -> None:
    base = ("stage=pretrain", "data=text", f"data.path={rows}", "hardware=cpu", "eval=none")
    lines = diff(plan_of(*base), plan_of(*base, "optimizer=sgd")).splitlines()
    memory = next(line for line in lines if "memory a device" in line)
    assert "optimizer -2.5 MiB" in memory or "-2.5 MiB" in memory


def test_several_stages_have_a_sum(plan_of: PlanOf, rows: Path) -> None:
    base = ("stage=[pretrain,sft]", "data=text", f"data.path={rows}", "hardware=cpu", "eval=none", "stage.pretrain.budget.steps=10")
    lines = diff(plan_of(*base), plan_of(*base, "stage.sft.budget.steps=400")).splitlines()
    assert "    tokens: 3,276,800 -> 6,553,600 (+3,276,800, +100 %)" in lines
    assert "all steps: tokens: 3,440,640 -> 6,717,440 (+3,276,800, +95.2 %)" in lines


@pytest.mark.parametrize("side", ["eval=perplexity", "quantize=int8"])
def test_steps_that_train_nothing_have_no_costs_to_tell(side: str, plan_of: PlanOf, rows: Path) -> None:
    base = ("stage=pretrain", "data=text", f"data.path={rows}", "hardware=cpu", "eval=none", side)
    lines = diff(plan_of(*base), plan_of(*base, "seed=4")).splitlines()
    assert [line for line in lines if line.startswith("    ") and "seed" not in line] == []
