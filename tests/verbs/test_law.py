"""`law=<file>` in a plan: tokens a parameter, the compute-optimal sizes and the expected loss, and no part of what a step is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.plan import Plan

Cli = Callable[..., Any]
WORDS = ("hardware=cpu", "eval=none")


@pytest.fixture
def law(tmp_path: Path) -> Path:
    file = tmp_path / "law.json"
    file.write_text(json.dumps({"form": "chinchilla", "E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "source": "a test"}))
    return file


def test_a_pretraining_says_what_its_sizes_mean(cli: Cli, law: Path, rows: Path) -> None:
    data = ("stage=[pretrain,sft]", "data=text", f"data.path={rows}", *WORDS, "stage.pretrain.budget.tokens=163840")
    plain, fitted = cli("plan", *data).out, cli("plan", *data, f"law={law}").out
    assert plain.count("0.493 tokens a parameter") == 1  # 163,840 / 332,352, and only of the pretraining
    assert "by Hoffmann et al.'s rule of 20 tokens a parameter" in plain
    assert "expected loss" not in plain
    assert "by the law" in fitted
    assert f"expected loss {1.69 + 406.4 / 332_352**0.34 + 410.7 / 163_840**0.28:.4g} nats a token" in fitted


def test_a_law_is_no_identity(plan_of: Callable[..., Plan], law: Path) -> None:
    without, within = plan_of("stage=pretrain", *WORDS), plan_of("stage=pretrain", *WORDS, f"law={law}")
    assert [step.digest for step in without.steps] == [step.digest for step in within.steps]
    assert Plan.from_json(json.loads(json.dumps(within.to_json()))) == within


def test_annealing_counts_what_was_pretrained_before(cli: Cli) -> None:
    out = cli("plan", "experiment=anneal_nano", *WORDS).out
    assert "0.641 tokens a parameter, 3.7 with those before" in out


def test_a_file_that_is_no_law_is_refused_in_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("not a law")
    for file in (tmp_path / "text.json", tmp_path / "missing.json", tmp_path):
        answer = cli("plan", "stage=pretrain", *WORDS, f"law={file}")
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
        assert answer.err.startswith(f"conf error: law={file}: ")
