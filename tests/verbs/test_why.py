"""`plan --why KEY`: every layer that set it with its file and line, the one that won, and what the compiler made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.compose import App
from lmforge.compose.why import Origins
from tests.conftest import ROOT

Cli = Callable[..., Any]


def layers(cli: Cli, key: str, *words: str) -> tuple[str, list[tuple[str, str]], str]:
    """The first line, (place, text) of each layer, and the whole answer."""
    answer = cli("plan", "--why", key, *words)
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    lines = answer.out.splitlines()
    found = [re.fullmatch(r"  ((?:\S+\.yaml:\d+)|typed|default|config\.json) +(.*?)(?:  +.*)?", line) for line in lines[1:]]
    return lines[0], [(one[1], one[2]) for one in found if one], answer.out


def test_a_root_key_through_an_option_and_an_experiment(cli: Cli) -> None:
    head, found, out = layers(cli, "optimizer.lr", "experiment=quickstart", "hardware=cpu")
    assert head.startswith("optimizer.lr = 0.02")
    assert [place.partition(":")[0] for place, _ in found] == ["conf/optimizer/muon.yaml", "conf/experiment/quickstart.yaml"]
    assert "optimizer=muon by conf/experiment/quickstart.yaml:" in out
    assert "not read by dpo, which has its own: stage.dpo.optimizer.lr = 0.002" in out
    for place, text in found:
        file, _, line = place.partition(":")
        assert text in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_a_stages_key_under_the_roots_and_over_its_yaml(cli: Cli) -> None:
    head, found, _ = layers(cli, "stage.dpo.optimizer.lr", "experiment=quickstart", "hardware=cpu", "stage.dpo.optimizer.lr=3e-3")
    assert head.startswith("stage.dpo.optimizer.lr = 0.003")
    assert [place.partition(":")[0].rpartition("/")[2] for place, _ in found] == ["muon.yaml", "quickstart.yaml", "dpo.yaml", "quickstart.yaml", "typed"]
    assert found[-1] == ("typed", "stage.dpo.optimizer.lr=3e-3")


def test_what_was_left_open_shows_the_arithmetic(cli: Cli) -> None:
    words = ("stage=[pretrain,sft]", "hardware=cpu")
    _, _, out = layers(cli, "stage.sft.optimizer.global_batch_tokens", *words)
    assert "in the plan: 16384 (global_batch_tokens = 64 rows x 256 = 16,384;" in out
    _, _, out = layers(cli, "stage.sft.seq_len", *words)
    assert "in the plan: 256" in out
    _, _, out = layers(cli, "stage.pretrain.budget.steps", *words)
    assert "in the plan: 406 (20 x 332,352 parameters = 6,647,040 tokens / 16,384 = 406 steps = 6,651,904 tokens)" in out
    _, _, out = layers(cli, "parallel.micro_batch_size", *words)
    assert "in the plan of pretrain: 32 (" in out
    assert "64 rows = 1 device x 32 rows x 2 accumulated" in out


def test_a_choice_of_exactly_one_is_replaced_whole(cli: Cli) -> None:
    head, found, out = layers(cli, "stage.pretrain.budget.tokens_per_parameter", "stage=pretrain", "hardware=cpu", "stage.pretrain.budget.tokens=1e6")
    assert head.startswith("stage.pretrain.budget.tokens_per_parameter = null")
    assert found[-1] == ("typed", "stage.pretrain.budget.tokens=1e6")
    assert "exactly one of them counts, so tokens_per_parameter is null" in out


def test_a_stages_yaml_outlives_an_option_chosen_for_it(cli: Cli) -> None:
    head, found, _ = layers(cli, "stage.dpo.optimizer.lr", "stage=[pretrain,dpo]", "hardware=cpu", "stage.dpo.optimizer=muon")
    assert head.startswith("stage.dpo.optimizer.lr = 5e-07")
    assert [place.partition(":")[0] for place, _ in found] == ["conf/optimizer/muon.yaml", "conf/stage/dpo.yaml"]


def test_an_interpolation_is_followed(cli: Cli) -> None:
    _, found, out = layers(cli, "stage.pretrain.seed", "stage=pretrain", "hardware=cpu", "seed=7")
    assert [text for _, text in found] == ["seed: ${seed}", "seed: 0", "seed=7"]
    assert "through ${seed}" in out


def test_a_choice_lists_every_defaults_list_that_made_it(cli: Cli) -> None:
    _, found, _ = layers(cli, "model", "experiment=quickstart", "hardware=cpu", "model=nano")
    assert [text for _, text in found] == ["model: nano", "override /model: micro", "model=nano"]
    _, found, _ = layers(cli, "optimizer.schedule", "stage=pretrain", "hardware=cpu", "optimizer.schedule=wsd")
    assert [text for _, text in found] == ["schedule: cosine", "optimizer.schedule=wsd"]


def test_an_alias_is_traced_to_the_option_behind_it(cli: Cli) -> None:
    _, found, out = layers(cli, "stage.anneal.budget.tokens", "experiment=anneal_nano", "hardware=cpu")
    assert [place.partition(":")[0] for place, _ in found] == ["conf/stage/pretrain.yaml", "conf/experiment/anneal_nano.yaml"]
    assert "stage=pretrain by conf/experiment/anneal_nano.yaml:4" in out


def test_what_a_dial_makes_of_its_number(cli: Cli) -> None:
    head, found, _ = layers(cli, "model.hidden_size", "stage=pretrain", "model=dial", "model.params=25e6", "hardware=cpu")
    assert head.startswith("model.hidden_size = ")
    assert found[-1][0] == "config.json"
    assert ("typed", "model=dial") in found


def test_the_quickstart_is_named_where_nobody_typed_it(cli: Cli) -> None:
    assert "experiment=quickstart by default" in layers(cli, "optimizer.lr", "hardware=cpu")[2]
    assert "experiment=quickstart by typed" in layers(cli, "optimizer.lr", "hardware=cpu", "experiment=quickstart")[2]


def test_a_users_own_file_is_named_as_it_lies(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cwd" / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "cwd" / "mine" / "optimizer" / "own.yaml").write_text("defaults: [adamw, _self_]\nlr: 0.5\n")
    answer = cli("plan", "--why", "optimizer.lr", "--config-dir", "mine", "stage=pretrain", "optimizer=own", "hardware=cpu")
    assert answer.out.splitlines()[0].startswith("optimizer.lr = 0.5")
    assert "mine/optimizer/own.yaml:2" in answer.out
    assert "optimizer=own by typed" in answer.out


def test_a_plan_that_is_refused_still_answers(cli: Cli) -> None:
    answer = cli("plan", "--why", "stage.pretrain.seq_len", "stage=pretrain", "model=70b", "hardware=h100x1")
    assert answer.code == 0
    assert "not resolved, the plan is refused: " in answer.out


@pytest.mark.parametrize(
    ("key", "near"),
    [("optimizer.rl", "optimizer.lr"), ("dpo.beta", "stage.dpo.beta"), ("stage.dpo.bta", "stage.dpo.beta"), ("model.hiden_size", "model.hidden_size")],
)
def test_an_unknown_key_names_the_nearest(key: str, near: str, cli: Cli) -> None:
    answer = cli("plan", "--why", key, "stage=[pretrain,dpo]", "hardware=cpu")
    assert (answer.code, answer.out, answer.err) == (2, "", f"conf error: {key}: unknown key; did you mean '{near}'?\n")


@pytest.mark.parametrize(
    "words",
    [("--why",), ("--why", "--json", "optimizer.lr"), ("--why", "seed", "-m", "model=nano,micro"), ("--why", "seed", "--table"), ("--why", "seed", "--launch")],
)
def test_what_cannot_be_asked_is_one_line(words: tuple[str, ...], cli: Cli) -> None:
    answer = cli("plan", *words, "stage=pretrain")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)


COMPOSITIONS = {
    "the quickstart": ("experiment=quickstart",),
    "an alias": ("experiment=anneal_nano", "optimizer.lr=1e-3"),
    "an option of a stage's own": ("stage=[pretrain,sft,dpo]", "stage.dpo.optimizer=muon", "stage.sft.precision=bf16", "stage.sft.budget.flops=1e12"),
    "rewards": ("stage=[pretrain,sft,reward,ppo]", "stage.ppo.reward=length", "seed=3", "optimizer.schedule=wsd"),
    "an adapter": ("stage=[pretrain,sft]", "adapter=lora", "stage.sft.adapter.r=4", "parallel=ddp"),
    "a larger experiment": ("experiment=assistant_1b", "hardware=h100x8"),
}


@pytest.mark.parametrize("words", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_the_layer_that_won_says_the_value_of_every_key(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of a composition: what stands at the place that is named is the value, but where a choice of one key made it null."""
    monkeypatch.chdir(tmp_path)
    app = App([*words, *(() if any("hardware" in word for word in words) else ("hardware=cpu",))])
    origins, keys = Origins(app), [key for key, _ in dotted(app.compose().config)]
    assert len(keys) > 90
    for key in keys:
        found = origins.of(key)
        assert found.layers, key
        last = found.layers[-1]
        if "exactly one" in last.note:
            assert found.value is None, key
        elif not last.says.endswith(" ..."):
            assert same(yaml.safe_load(re.split(r"[:=]", last.says, maxsplit=1)[1]), found.value), (key, last, found.value)


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        elif key != "type" and f"{prefix}{key}" not in ("experiment", "sweep"):
            yield f"{prefix}{key}", value


def same(said: Any, value: Any) -> bool:
    try:
        return bool(float(said) == float(value))
    except (TypeError, ValueError):
        return bool(said == value or str(said) == str(value))


def test_an_option_that_begins_from_another_names_both(cli: Cli) -> None:
    """h100x512 begins from h100x1; only the first was typed."""
    _, found, out = layers(cli, "hardware.memory_bytes", "hardware=h100x512", "stage=pretrain", "model=1b")
    assert [place.partition(":")[0] for place, _ in found] == ["conf/hardware/h100x1.yaml"]
    assert "hardware=h100x1 by conf/hardware/h100x512.yaml:3, hardware=h100x512 by typed" in out


def test_a_key_that_is_none_is_answered_in_a_short_line(cli: Cli) -> None:
    answer = cli("plan", "--why", "nonsense", "stage=pretrain", "model=nano")
    assert answer.code == 2
    assert answer.err.startswith("conf error: nonsense: unknown key; keys begin with one of: ")
    assert len(answer.err) < 300
