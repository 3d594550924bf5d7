"""list: every group, option and key, explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.codec import keys
from lmforge.compose.catalog import Catalog
from lmforge.registry import types
from lmforge.verbs.list import tree, type_name

Cli = Callable[..., Any]
CATALOG = Catalog.of()
OPTIONS = [f"{group}={option}" for group, options in sorted(CATALOG.options.items()) for option in sorted(options)]


def test_every_group_and_option_is_listed(cli: Cli) -> None:
    answer = cli("list")
    assert (answer.code, answer.err, answer.written) == (0, "", [])
    shown = {line.split()[0]: line.split()[1:] for line in answer.out.splitlines() if line and not line.startswith("list")}
    assert shown == {group: sorted(options) for group, options in CATALOG.options.items()}


def test_the_issues_groups_and_options_are_there() -> None:
    wanted = {
        "model": "nano micro dial 400m 70b 1b 7b 13b gpt3_175b hf",
        "optimizer": "sgd momentum adam adamw adamw_8bit adafactor muon",
        "optimizer/schedule": "constant linear cosine wsd",
        "precision": "fp32 bf16 fp16",
        "data": "pystdlib text hf mixture",
        "stage": "pretrain sft dpo",
        "eval": "none perplexity lm_eval",
        "quantize": "none int8",
        "parallel": "single ddp fsdp fsdp_zero2 hsdp deepspeed_zero1 deepspeed_zero2 deepspeed_zero3 tp fsdp_tp pp fsdp_pp 3d",
        "hardware": "here a100x8 h100x8 h200x1 h200x8 cpu",
        "track": "wandb tensorboard none",
        "experiment": "quickstart",
    }
    for group, options in wanted.items():
        assert set(options.split()) <= set(CATALOG.options[group]), group


@pytest.mark.parametrize("group", sorted(CATALOG.options))
def test_a_group_tells_what_each_option_is(group: str, cli: Cli) -> None:
    answer = cli("list", group)
    lines = answer.out.partition("\n\n")[0].splitlines()
    assert answer.code == 0
    assert [line.split()[0] for line in lines] == [f"{group}={option}" for option in sorted(CATALOG.options[group])]
    assert all(len(line.split()) > 2 for line in lines)


def test_parallel_tells_what_runs_with_what(cli: Cli) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in cli("list", "parallel").out.partition("\n\n")[2].splitlines()[1:]}
    columns = rows.pop("single")
    assert columns == ["ddp", "fsdp", "tp", "pp", "cp", "deepspeed"]
    assert rows["stage=pretrain"] == ["yes", "yes", "yes", "yes", "yes", "no", "yes"]
    assert rows["stage=ppo"] == ["yes", "yes", "yes", "no", "no", "no", "no"]
    assert rows["guard=optimizer.max_skips>0"] == ["yes", "yes", "yes", "yes", "yes", "no", "no"]
    assert rows["adapter=qlora"] == ["yes", "yes", "yes", "no", "no", "no", "no"]


@pytest.mark.parametrize("word", OPTIONS)
def test_an_option_shows_each_key_with_its_meaning(word: str, cli: Cli) -> None:
    answer = cli("list", word)
    assert (answer.code, answer.err) == (0, "")
    group, _, option = word.partition("=")
    if group in ("experiment", "sweep"):
        assert answer.out.strip() == CATALOG.options[group][option].read_text().strip()
        return
    cls = types({"model/tokenizer": "tokenizer"}.get(group, group))[tree(CATALOG, group, option)["type"]]
    root = f"stage.{option}" if group == "stage" else group.replace("/", ".")
    rows = {line.split()[0]: line for line in answer.out.splitlines() if line.startswith(f"  {root}.")}
    for name, (_, about) in keys(cls).items():
        assert f"{root}.{name}" in rows, name
        assert about.meaning in rows[f"{root}.{name}"]


def test_the_keys_of_dpo(cli: Cli) -> None:
    rows = {line.split()[0]: line for line in cli("list", "stage=dpo").out.splitlines()[2:]}
    assert " ".join(rows["stage.dpo.beta"].split()) == "stage.dpo.beta 0.1 float > 0 strength of the pull towards the reference policy"
    assert "float >= 0 < 0.5" in rows["stage.dpo.label_smoothing"]
    assert "int | null > 0, steps" in rows["stage.dpo.budget.steps"]
    assert "{lr=5e-07}" in rows["stage.dpo.optimizer"]
    assert "(the root's)" in rows["stage.dpo.precision"]


def test_inherited_values_are_shown(cli: Cli) -> None:
    """h100x8 is h100x1 with eight devices; muon brings a cosine; a mixture brings its sources."""
    eight = cli("list", "hardware=h100x8").out
    assert " ".join(next(line for line in eight.splitlines() if "hardware.devices" in line).split()).startswith("hardware.devices 8 int")
    assert "85520809984" in eight
    assert "optimizer.schedule.final" in cli("list", "optimizer=muon").out
    assert "data.sources.own.path" in cli("list", "data=mixture").out


def test_several_words_are_shown_one_after_the_other(cli: Cli) -> None:
    out = cli("list", "quantize", "optimizer.schedule=wsd").out
    assert "quantize=int8" in out
    assert "optimizer.schedule.decay" in out


def test_a_users_own_option_is_listed(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "own" / "optimizer" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# Mine, only faster.\ndefaults: [adamw, _self_]\nlr: 0.5\n")
    assert "optimizer=mine" in cli("list", "optimizer", "--config-dir", str(tmp_path / "own")).out
    shown = cli("list", "optimizer=mine", "--config-dir", str(tmp_path / "own")).out
    assert "Mine, only faster." in shown
    assert " ".join(next(line for line in shown.splitlines() if "optimizer.lr" in line).split()).startswith("optimizer.lr 0.5 float > 0 peak")


@pytest.mark.parametrize(
    ("hint", "name"),
    [
        (int, "int"),
        (int | None, "int | null"),
        (str | None, "text | null"),
        (tuple[str, ...], "tuple[text, ...]"),
        (bool, "bool"),
        (dict[str, float], "dict[text, float]"),
    ],
)
def test_types_are_named_as_a_person_writes_them(hint: Any, name: str) -> None:
    assert type_name(hint) == name


def test_help_names_every_verb_and_group(cli: Cli) -> None:
    from lmforge.__main__ import VERBS

    answer = cli("--help")
    assert answer.code == 0
    assert set(VERBS) == {"calibrate", "compare", "diff", "export", "generate", "list", "merge", "plan", "rank", "run"}
    assert all(f"  {word} " in answer.out for word in (*VERBS, *CATALOG.options))


def test_the_version_is_told(cli: Cli) -> None:
    assert cli("--version").out.strip()
