"""diff: what two plans differ in, and which steps run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.plan import Plan

Cli = Callable[..., Any]


@pytest.fixture
def words(rows: Path) -> tuple[str, ...]:
    return ("stage=[pretrain,sft]", "data=text", f"data.path={rows}", "hardware=cpu", "eval=none")


def test_a_changed_key_names_what_runs_again(cli: Cli, words: tuple[str, ...]) -> None:
    answer = cli("diff", *words, "--", *words, "stage.sft.optimizer.lr=1e-3")
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    assert answer.out.splitlines() == [
        "~ sft: runs again (optimizer.lr)",
        "    optimizer.lr: 2e-05 -> 0.001",
        "what the first plan made of sft cannot be used for the second",
        "5 of 6 steps are the same in both",
    ]


def test_what_follows_runs_again_and_costs_are_shown(cli: Cli, words: tuple[str, ...]) -> None:
    lines = cli("diff", *words, "stage.pretrain.budget.steps=10", "--", *words, "stage.pretrain.budget.steps=20").out.splitlines()
    assert "~ pretrain: runs again (budget.steps)" in lines
    assert "    tokens: 163,840 -> 327,680 (+163,840, +100 %)" in lines
    assert "    FLOPs: 3.91e+11 -> 7.82e+11 (+3.91e+11, +100 %)" in lines
    assert lines[-2:] == ["what the first plan made of pretrain, sft cannot be used for the second", "4 of 6 steps are the same in both"]
    assert "~ sft: runs again (what it consumes changed)" in lines


def test_another_model_is_named_as_the_reason(cli: Cli, words: tuple[str, ...]) -> None:
    out = cli("diff", *words, "stage.pretrain.budget.steps=9", "--", *words, "stage.pretrain.budget.steps=9", "model.rope_theta=20000").out
    assert "~ pretrain: runs again (its model changed)" in out
    assert "    model.rope_theta: 10000.0 -> 20000.0" in out


def test_execution_is_shown_and_runs_nothing_again(cli: Cli, words: tuple[str, ...]) -> None:
    out = cli("diff", *words, "--", *words, "parallel=ddp", "parallel.devices=2").out
    assert "runs again" not in out
    assert "= sft: the same step, run in another way" in out
    assert "    parallel.devices: None -> 2" in out
    assert "    devices: 1 -> 2" in out
    assert out.splitlines()[-1] == "6 of 6 steps are the same in both"


def test_steps_come_and_go(cli: Cli, words: tuple[str, ...]) -> None:
    out = cli("diff", *words, "--", *words, "quantize=int8", "stage=pretrain").out.splitlines()
    assert "+ quantize: new step" in out
    assert "- sft: gone" in out


def test_equal_plans(cli: Cli, words: tuple[str, ...]) -> None:
    assert cli("diff", *words, "--", *words).out.strip() == "6 of 6 steps are the same in both"


def test_a_run_stands_for_its_plan(cli: Cli, plan_of: Callable[..., Plan], words: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "20260101-000000-mine"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "plan.json").write_text(json.dumps(plan_of(*words).to_json()))
    assert cli("diff", str(run), "--", *words).out.strip() == "6 of 6 steps are the same in both"
    assert "~ sft: runs again (budget.steps)" in cli("diff", str(run), "--", *words, "stage.sft.budget.steps=3").out


def test_one_side_is_refused(cli: Cli, words: tuple[str, ...]) -> None:
    answer = cli("diff", *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "expects two sides" in answer.err
