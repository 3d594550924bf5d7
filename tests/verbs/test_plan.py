"""plan: EXPLAIN, as text and as JSON; nothing runs and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.plan import Plan
from lmforge.runtime.workspace import Workspace

Cli = Callable[..., Any]
STEP = {"name", "stage", "digest", "status", "inputs", "placement", "cost"}
PLACEMENT = {"devices", "mesh", "micro_batch_size", "accumulation", "strategy"}
COST = {
    "params_total", "params_active", "params_trainable", "tokens", "train_flops", "peak_bytes_per_device", "communication", "step_seconds", "step_parts",
    "tokens_per_second", "mfu", "hfu", "seconds", "device_hours", "money", "energy_kwh",
}  # fmt: skip
PEAK = {"params", "grads", "optimizer", "parts", "moment", "total"}


@pytest.fixture
def words(rows: Path) -> tuple[str, ...]:
    return ("stage=[pretrain,sft]", "data=text", f"data.path={rows}", "hardware=cpu", "eval=none")


@pytest.mark.parametrize(
    "experiment", ["experiment=quickstart", "stage=dpo model=7b parallel=fsdp hardware=h100x8", "experiment=pretrain_400m hardware=h100x8"]
)
def test_json_has_the_names_that_scripts_rely_on(experiment: str, cli: Cli) -> None:
    answer = cli("plan", "--json", *experiment.split())
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    for step in json.loads(answer.out)["steps"]:
        assert step.keys() >= STEP
        assert step["placement"].keys() == PLACEMENT
        assert step["cost"].keys() == COST
        assert step["cost"]["peak_bytes_per_device"].keys() == PEAK
        assert step["status"] == "new"
        assert all(one.keys() == {"step", "kind"} for one in step["inputs"])
        assert len(step["digest"]) == 16


def test_json_of_the_issues_example(cli: Cli) -> None:
    plain = json.loads(cli("plan", "--json", "stage=dpo", "model=7b", "parallel=fsdp", "hardware=h100x8").out)
    dpo = next(step for step in plain["steps"] if step["name"] == "dpo")
    assert (dpo["stage"], dpo["cost"]["params_total"], dpo["cost"]["params_active"]) == ("dpo", 7_298_617_344, 7_298_617_344)
    assert dpo["placement"]["devices"] == 8
    assert dpo["placement"]["mesh"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 8, "cp": 1, "tp": 1}
    assert dpo["placement"]["micro_batch_size"] * dpo["placement"]["accumulation"] * 8 == 64
    peak = dpo["cost"]["peak_bytes_per_device"]
    static = {"params": 4 * 7_298_617_344 // 8, "grads": 4 * 7_298_617_344 // 8, "optimizer": 8 * 7_298_617_344 // 8}
    assert {part: peak[part] for part in static} == static
    assert peak["total"] == sum(peak["parts"].values())
    seconds, hours = dpo["cost"]["seconds"], dpo["cost"]["device_hours"]
    assert hours * 3600 == pytest.approx(8 * seconds)
    assert seconds == pytest.approx(dpo["cost"]["step_seconds"]["expected"] * dpo["cost"]["tokens"] / 64 / 8192, rel=1e-9)


def test_json_reads_back_as_the_plan(cli: Cli, plan_of: Callable[..., Plan], words: tuple[str, ...]) -> None:
    """`status` and `why` are the store's, and pass through."""
    assert Plan.from_json(json.loads(cli("plan", "--json", *words).out)) == plan_of(*words)


def test_the_flag_may_stand_anywhere(cli: Cli, words: tuple[str, ...]) -> None:
    assert cli("plan", "--json", *words).out == cli("plan", *words, "--json").out


def test_text_shows_the_tree_and_the_arithmetic(cli: Cli, words: tuple[str, ...]) -> None:
    out = cli("plan", *words, "stage.pretrain.budget.tokens=200e3").out
    assert out.splitlines()[0] == "pretrain-sft: 6 steps, 0 done; laptop, 8 cores, 16 GiB: 8 x cpu, 16.0 GiB"
    assert "16,384 tokens a step = 64 rows x 256" in out
    assert "200,000 tokens / 16,384 = 13 steps = 212,992 tokens" in out
    assert "64 rows = 1 device x 32 rows x 2 accumulated" in out
    assert "332,352 parameters, 332,352 trainable" in out
    assert "static memory 5.1 MiB a device (params 1.3 MiB, grads 1.3 MiB, optimizer 2.5 MiB)" in out
    assert "causal attention" in out.splitlines()[-1]  # which convention the FLOPs follow


def test_without_words_it_is_the_quickstart(cli: Cli) -> None:
    assert cli("plan").out.splitlines()[0].startswith("quickstart: ")


def test_what_is_done_stale_or_new_and_why(cli: Cli, plan_of: Callable[..., Plan], words: tuple[str, ...], tmp_path: Path) -> None:
    """The store is made by hand here: three steps of an earlier plan are finished in it."""
    store = Workspace(tmp_path / "store")
    store.prepare()
    before = plan_of(*words, "stage.pretrain.budget.steps=3")
    for name in ("data", "tokenizer", "pretrain"):
        store.folder(before.step(name)).mkdir()
        store.finish(before.step(name), {}, 1.0, {})
    plain = json.loads(cli("plan", "--json", *words, "stage.pretrain.budget.steps=4", f"output={tmp_path / 'store'}").out)
    status = {step["name"]: (step["status"], step["why"]) for step in plain["steps"]}
    assert status["data"] == status["tokenizer"] == ("done", "")
    assert status["pretrain"] == ("stale", "budget.steps 3 -> 4")
    assert status["sft"] == status["tokens.text"] == ("new", "")


def test_planning_twice_and_elsewhere_is_the_same_plan(cli: Cli, words: tuple[str, ...]) -> None:
    first, second = (json.loads(cli("plan", "--json", *words, f"output={output}").out)["steps"] for output in ("outputs", "elsewhere"))
    assert [step["digest"] for step in first] == [step["digest"] for step in second]


def test_a_sweep_is_planned_point_by_point(cli: Cli, words: tuple[str, ...]) -> None:
    answer = cli("plan", "-m", *words, "model=nano,micro", "optimizer.lr=1e-3,3e-3")
    heads = [line for line in answer.out.splitlines() if line.startswith("pretrain-sft: ")]
    assert (answer.code, len(heads), answer.written) == (0, 4, [])


def test_a_sweep_file_is_planned_point_by_point(cli: Cli) -> None:
    answer = cli("plan", "sweep=lr_nano", "hardware=cpu")
    assert sum("steps, 0 done" in line for line in answer.out.splitlines()) == 3
    assert answer.written == []


@pytest.mark.parametrize("words", ["--cfg job stage=pretrain", "--info defaults stage=pretrain", "--hydra-help", "--shell-completion install=bash"])
def test_hydras_flags_answer_and_write_nothing(words: str, cli: Cli) -> None:
    answer = cli(*words.split())
    assert (answer.code, answer.written) == (0, [])
    assert answer.out


def test_the_shell_completes_options(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "lmforge optimizer=ad")
    assert cli("--shell-completion", "query=bash").out.split() == [f"optimizer={one}" for one in ("adafactor", "adam", "adamw", "adamw_8bit")]


def test_cfg_job_is_the_composed_config(cli: Cli) -> None:
    import yaml

    config = yaml.safe_load(cli("--cfg", "job", "stage=dpo", "stage.dpo.beta=0.2", "optimizer=muon").out)
    assert (config["stage"]["dpo"]["beta"], config["optimizer"]["type"]) == (0.2, "muon")
    assert list(config["stage"]) == ["dpo"]


def test_help_names_every_question(cli: Cli) -> None:
    answer = cli("plan", "--help")
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    assert all(f"--{word}" in answer.out for word in ("json", "launch", "why KEY", "table", "analyze RUN"))
