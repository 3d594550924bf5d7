"""What is said of several runs: compare, diff of a stored run, and the plans of a sweep. Run folders are made by the store's own functions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.plan import Plan
from lmforge.runtime.workspace import Workspace

Cli = Callable[..., Any]
Make = Callable[..., Path]
SAMPLE = {"prompt": "def ", "text": "a sample text"}


@pytest.fixture
def made(plan_of: Callable[..., Plan], rows: Path, tmp_path: Path) -> Make:
    """`made("name", "override", ..., loss=2.0)`: a finished run under that name in `tmp_path/store`."""
    words = ("stage=[pretrain,sft]", "data=text", f"data.path={rows}", "hardware=cpu", "eval=none", "stage.pretrain.budget.steps=5")

    def go(name: str, *overrides: str, loss: float = 2.0, base: tuple[str, ...] = words) -> Path:
        plan = plan_of(*base, *overrides)
        plan = dataclasses.replace(plan, experiment=dataclasses.replace(plan.experiment, name=name))
        store = Workspace(tmp_path / "store")
        store.prepare()
        folder = store.open_run(plan)
        figures: dict[str, dict[str, Any]] = {step.name: {"seen": 3, "view": "text"} for step in plan.steps}
        figures["pretrain"] |= {"loss": loss, "final": True, "sample": SAMPLE, "worst_layers": [{"name": "layers.0", "error": 0.1}]}
        store.close_run(folder, plan, figures)
        return folder

    return go


def compared(cli: Cli, *words: str) -> dict[str, Any]:
    answer = cli("compare", "--json", *words)
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    plain: dict[str, Any] = json.loads(answer.out)
    return plain


def test_only_keys_that_differ_once_each(cli: Cli, made: Make) -> None:
    one, two = made("one"), made("two", "model.hidden_size=128", "stage.sft.optimizer.lr=1e-3", loss=1.5)
    plain = compared(cli, str(one), str(two))
    assert plain["runs"] == [one.name, two.name]
    assert plain["keys"] == {"model.hidden_size": {one.name: 64, two.name: 128}, "sft.optimizer.lr": {one.name: 2e-05, two.name: 0.001}}
    assert plain["metrics"]["pretrain.loss"] == {one.name: 2.0, two.name: 1.5}


def test_figures_are_numbers_only(cli: Cli, made: Make) -> None:
    plain = compared(cli, str(made("one")))
    assert {key for key in plain["metrics"] if key.startswith("pretrain.")} == {"pretrain.loss", "pretrain.seen"}
    assert plain["metrics"]["tokenizer.seen"]


def test_keys_of_steps_that_not_all_runs_have_are_left_out(cli: Cli, made: Make) -> None:
    one, two = made("one"), made("two", "stage=pretrain", "stage.pretrain.seed=4")
    plain = compared(cli, str(one), str(two))
    assert plain["keys"] == {"pretrain.seed": {one.name: 0, two.name: 4}}
    assert plain["metrics"]["sft.seen"] == {one.name: 3, two.name: None}


def test_long_names_are_shown_whole_in_a_narrow_terminal(cli: Cli, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    runs = [made(f"run{index}", f"stage.pretrain.optimizer.schedule.warmup=0.0{index + 1}") for index in range(6)]
    lines = cli("compare", *map(str, runs)).out.splitlines()
    row = next(line for line in lines if "pretrain.optimizer.schedule.warmup" in line)
    assert row.replace("│", " ").split() == ["pretrain.optimizer.schedule.warmup", "0.01", "0.02", "0.03", "0.04", "0.05", "0.06"]
    assert "…" not in "".join(lines)


def test_more_than_six_runs_are_rows(cli: Cli, made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    runs = [made(f"run{index}", f"stage.pretrain.seed={index}", loss=index / 4) for index in range(7)]
    lines = cli("compare", f"output={tmp_path / 'store'}").out.splitlines()
    for index, run in enumerate(runs):
        row = next(line for line in lines if run.name in line)
        assert row.replace("│", " ").split() == [run.name, str(index), f"{index / 4:.5g}"]
    assert max(map(len, lines)) <= 100
    assert "figures that are the same in all 7 runs are left out" in lines[-1]


def test_output_says_where_runs_are_looked_for(cli: Cli, made: Make, tmp_path: Path) -> None:
    one, two = made("one"), made("two")
    assert compared(cli, one.name, f"output={tmp_path / 'store'}")["runs"] == [one.name]
    assert set(compared(cli, f"output={tmp_path / 'store'}")["runs"]) == {one.name, two.name}
    answer = cli("compare", one.name)
    assert (answer.code, "no such run" in answer.err) == (2, True)
    assert "elsewhere/runs" in cli("compare", "output=elsewhere").err


def test_steps_are_compared_too(cli: Cli, plan_of: Callable[..., Plan], rows: Path, tmp_path: Path) -> None:
    store = Workspace(tmp_path / "store")
    store.prepare()
    folders = []
    for seed in (1, 2):
        step = plan_of("stage=pretrain", "data=text", f"data.path={rows}", "hardware=cpu", f"stage.pretrain.seed={seed}").step("pretrain")
        store.folder(step).mkdir()
        store.finish(step, {"loss": seed / 2, "sample": SAMPLE}, 1.0, {})
        folders.append(store.folder(step))
    plain = compared(cli, *map(str, folders))
    assert list(plain["keys"].values()) == [{folders[0].name: 1, folders[1].name: 2}]
    assert plain["metrics"] == {"pretrain.loss": {folders[0].name: 0.5, folders[1].name: 1.0}}


def test_runs_of_one_name_in_two_places_are_two(cli: Cli, made: Make, tmp_path: Path) -> None:
    one = made("one")
    other = tmp_path / "other" / one.name
    other.parent.mkdir()
    one.rename(other)
    again = tmp_path / "again" / one.name
    again.mkdir(parents=True)
    for file in other.iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    assert compared(cli, str(other), str(again), str(again))["runs"] == [str(other), str(again)]


def test_a_run_that_has_not_finished_is_refused_in_one_line(cli: Cli, made: Make, tmp_path: Path) -> None:
    run = made("one")
    (run / "run.json").unlink()
    answer = cli("compare", run.name, f"output={tmp_path / 'store'}")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "has not finished" in answer.err


WORDS = ("stage=[pretrain,sft]", "data=text", "hardware=cpu", "eval=none", "stage.pretrain.budget.steps=5")


def test_diff_finds_a_run_elsewhere(cli: Cli, made: Make, rows: Path, tmp_path: Path) -> None:
    run, store = made("one"), tmp_path / "store"
    run = run.rename(run.with_name("mine"))
    words = (*WORDS, f"data.path={rows}")
    for line in (["mine", f"output={store}", "--", *words], [f"output={store}", "mine", "--", *words], [*words, "--", "mine", f"output={store}"]):
        answer = cli("diff", *line)
        assert (answer.err, answer.out.strip()) == ("", "6 of 6 steps are the same in both")
    assert "no such run" in cli("diff", "mine", "--", *words).err
    (tmp_path / "other" / "runs").mkdir(parents=True)
    made("two").rename(tmp_path / "other" / "runs" / "theirs")
    assert cli("diff", "mine", f"output={store}", "--", "theirs", f"output={tmp_path / 'other'}").out.strip() == "6 of 6 steps are the same in both"


def _drop(plain: dict[str, Any], *path: str | int) -> None:
    for one in path[:-1]:
        plain = plain[one]  # type: ignore[index]
    del plain[path[-1]]  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [("steps",), ("steps", 0, "cost"), ("steps", 3, "spec", "seed"), ("experiment", "stages")])
def test_diff_refuses_the_plan_of_another_version_in_one_line(path: tuple[str | int, ...], cli: Cli, made: Make, rows: Path) -> None:
    run = made("one")
    plain = json.loads((run / "plan.json").read_text())
    _drop(plain, *path)
    (run / "plan.json").write_text(json.dumps(plain))
    answer = cli("diff", str(run), "--", *WORDS, f"data.path={rows}")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert "made by another version, or its data has moved" in answer.err
    assert str(path[-1]) in answer.err


def test_diff_refuses_a_run_whose_data_has_moved_in_one_line(cli: Cli, made: Make, rows: Path) -> None:
    run = made("one")
    text = (run / "plan.json").read_text()
    assert str(rows) in text
    (run / "plan.json").write_text(text.replace(str(rows), "/nowhere/rows"))
    answer = cli("diff", str(run), "--", *WORDS, f"data.path={rows}")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "its data has moved (" in answer.err
    assert "/nowhere/rows" in answer.err


def test_the_plans_of_a_sweep_are_json_lines(cli: Cli, rows: Path) -> None:
    words = (*WORDS, f"data.path={rows}")
    lines = cli("plan", "-m", "--json", *words, "stage.pretrain.seed=1,2,3").out.splitlines()
    plans = [json.loads(line) for line in lines]
    assert [Plan.from_json(plan).step("pretrain").spec.seed for plan in plans] == [1, 2, 3]  # type: ignore[attr-defined]
    assert all(step["status"] == "new" for plan in plans for step in plan["steps"])
    assert len(cli("plan", "--json", *words).out.splitlines()) > 100
