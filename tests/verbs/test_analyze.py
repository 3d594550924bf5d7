"""`plan --analyze RUN`, compare's costs and the residuals for calibration, over a store made by its own functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.plan import Plan
from lmforge.runtime.residuals import measured
from lmforge.runtime.workspace import Workspace

Cli = Callable[..., Any]
FOUND = {"step_seconds": 0.25, "tokens_per_second": 65536.0, "timed_steps": 4, "peak_bytes": 2**30, "reserved_bytes": 2**31, "resident_bytes": 2**32}


@pytest.fixture
def run(plan_of: Callable[..., Plan], rows: Path, tmp_path: Path) -> Path:
    """A finished run of five steps, of which the pretraining saw half of the tokens planned."""
    words = ("stage=[pretrain,sft]", "data=text", f"data.path={rows}", "hardware=cpu", "eval=none", "stage.pretrain.budget.steps=5")
    plan, store = plan_of(*words), Workspace(tmp_path / "store")
    store.prepare()
    for step in plan.steps:
        store.folder(step).mkdir()
        metrics: dict[str, Any] = {"seen": 3}
        if step.name == "pretrain":
            metrics = {"loss": 2.0, "steps": 5, "tokens": 40_960, "train_s": 1.5, "measured": {**FOUND, "device": "a GPU"}}
        store.finish(step, metrics, 2.0, {}, "f00d")
    folder = store.open_run(plan)
    store.close_run(folder, plan, {step.name: store.record(step)["metrics"] for step in plan.steps})
    return folder


def test_what_was_measured_is_no_metric(run: Path) -> None:
    record = json.loads(next(run.parent.parent.glob("steps/pretrain-*/step.json")).read_text())
    assert record["metrics"] == {"loss": 2.0, "steps": 5, "tokens": 40_960, "train_s": 1.5}
    cost = record["predicted"]
    assert record["measured"]["train_flops"] == cost["train_flops"] / 2
    assert (record["measured"]["machine"], record["measured"]["seconds"], record["measured"]["train_seconds"]) == ("f00d", 2.0, 1.5)


def test_predicted_and_measured_side_by_side(cli: Cli, run: Path) -> None:
    answer = cli("plan", "--analyze", str(run))
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    lines = {line.strip().partition("  ")[0]: line.split() for line in answer.out.splitlines()}
    assert lines["tokens"] == ["tokens", "81,920", "40,960", "0.50"]
    assert lines["tokens/s"][-2] == "65,536"
    assert lines["peak memory a device"][-3:-1] == ["1.0", "GiB"]
    assert "sft [sft]" in answer.out
    assert "data" not in answer.out.split()


def test_as_json_and_of_one_step(cli: Cli, run: Path) -> None:
    step = next(run.parent.parent.glob("steps/pretrain-*"))
    answer = cli("plan", "--json", "--analyze", str(step))
    plain = json.loads(answer.out)
    assert [one["name"] for one in plain] == ["pretrain"]
    assert plain[0]["figures"]["tokens"] == {"predicted": 81_920, "measured": 40_960, "ratio": 0.5}
    assert plain[0]["figures"]["step_seconds"]["measured"] == 0.25


def test_a_run_is_found_by_its_name_in_an_output_folder(cli: Cli, run: Path) -> None:
    assert cli("plan", "--analyze", run.name, f"output={run.parent.parent}").out == cli("plan", "--analyze", str(run)).out


def test_what_cannot_be_analyzed_is_one_line(cli: Cli, run: Path) -> None:
    data = next(run.parent.parent.glob("steps/data-*"))
    for words in (("nothing",), (str(data),), (str(run), "stage=dpo"), (str(run), "--table"), ()):
        answer = cli("plan", "--analyze", *words)
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    (run / "run.json").unlink()
    assert cli("plan", "--analyze", run.name, f"output={run.parent.parent}").code == 2


def test_compare_shows_costs(cli: Cli, run: Path) -> None:
    plain = json.loads(cli("compare", "--json", str(run)).out)
    assert plain["cost"]["pretrain.step_seconds"][run.name]["measured"] == 0.25
    assert "pretrain.step_seconds" in cli("compare", str(run)).out


def test_residuals_are_the_measured_steps_of_a_machine(run: Path) -> None:
    output = run.parent.parent
    (one,) = measured(output)
    assert (one.step.name, one.machine, one.cost.tokens, one.measured["step_seconds"]) == ("pretrain", "f00d", 81_920, 0.25)
    assert one.figures["tokens"].ratio == 0.5
    assert len(measured(output, "f00d")) == 1
    assert measured(output, "beef") == []
    assert measured(output / "nowhere") == []
    next(output.glob("steps/sft-*/step.json")).write_text("{}")
    assert len(measured(output)) == 1
