"""Which layer wins: the command line over the experiment, the experiment over an option's YAML; a stage's own keys over the root's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import ConfigError
from lmforge.experiment import Experiment

Compose = Callable[..., Experiment]


def stage(experiment: Experiment, name: str) -> Any:
    return next(one.stage for one in experiment.stages if one.name == name)


def test_root_groups_flow_into_every_stage_and_a_stages_own_keys_win(experiment_of: Compose) -> None:
    made = experiment_of("stage=[pretrain,sft]", "optimizer=muon", "optimizer.weight_decay=0.3")
    pretrain, sft = stage(made, "pretrain").optimizer, stage(made, "sft").optimizer
    assert (pretrain.type, pretrain.weight_decay, pretrain.lr) == ("muon", 0.3, 0.02)
    assert (sft.type, sft.weight_decay, sft.lr) == ("muon", 0.3, 2e-5)  # stage/sft.yaml says its own lr


def test_the_command_line_wins_over_a_stages_yaml(experiment_of: Compose) -> None:
    assert stage(experiment_of("stage=[pretrain,sft]", "stage.sft.optimizer.lr=0.5"), "sft").optimizer.lr == 0.5


def test_a_stage_has_its_own_option_of_a_group(experiment_of: Compose) -> None:
    made = experiment_of("stage=[pretrain,sft]", "stage.sft.optimizer=muon", "stage.sft.parallel=ddp")
    assert stage(made, "pretrain").optimizer.type == "adamw"
    assert (stage(made, "sft").optimizer.type, stage(made, "sft").parallel.type) == ("muon", "ddp")
    assert stage(made, "sft").optimizer.lr == 2e-5  # the stage's rate is about the stage, so it outlives the option
    assert stage(made, "sft").optimizer.adamw_lr == 3e-3  # the option's own


def test_a_stages_own_option_takes_the_keys_typed_for_it(experiment_of: Compose) -> None:
    made = experiment_of("stage=[pretrain,sft]", "stage.sft.optimizer=muon", "stage.sft.optimizer.lr=0.1", "stage.sft.optimizer.momentum=0.5")
    assert (stage(made, "sft").optimizer.lr, stage(made, "sft").optimizer.momentum) == (0.1, 0.5)


def test_a_stage_has_its_own_schedule_and_keeps_the_roots_optimizer(experiment_of: Compose) -> None:
    made = experiment_of("stage=[pretrain,sft]", "optimizer=muon", "stage.sft.optimizer.schedule=wsd", "stage.sft.optimizer.schedule.decay=0.5")
    assert (stage(made, "pretrain").optimizer.schedule.type, stage(made, "sft").optimizer.schedule.type) == ("cosine", "wsd")
    assert (stage(made, "sft").optimizer.type, stage(made, "sft").optimizer.schedule.decay) == ("muon", 0.5)


def test_a_stage_has_its_own_data(experiment_of: Compose, rows: Path) -> None:
    made = experiment_of("stage=[pretrain,sft]", "stage.sft.data=text", f"stage.sft.data.path={rows}")
    assert (stage(made, "pretrain").data.type, stage(made, "sft").data.type, made.data.type) == ("pystdlib", "text", "pystdlib")


def test_deleting_a_stages_own_key_gives_it_the_roots(experiment_of: Compose) -> None:
    assert stage(experiment_of("stage=[pretrain,sft]", "~stage.sft.optimizer.lr", "optimizer.lr=0.25"), "sft").optimizer.lr == 0.25


def test_one_seed_for_all_stages_unless_one_has_its_own(experiment_of: Compose) -> None:
    made = experiment_of("stage=[pretrain,sft]", "seed=7", "stage.sft.seed=8")
    assert (stage(made, "pretrain").seed, stage(made, "sft").seed) == (7, 8)


def test_stages_run_in_the_order_typed(experiment_of: Compose) -> None:
    assert [one.name for one in experiment_of("stage=[pretrain,dpo,sft]").stages] == ["pretrain", "dpo", "sft"]


def test_the_quickstart_does_not_leak_into_a_stage(experiment_of: Compose) -> None:
    """What `stage=` composes is the root defaults, with nothing of the experiment that runs when nothing is typed."""
    from lmforge.verbs._arguments import with_quickstart

    quick = experiment_of(*with_quickstart([]))
    assert [one.name for one in quick.stages] == ["pretrain", "sft", "dpo"]
    assert (quick.name, quick.quantize.type, quick.model.hidden_size) == ("quickstart", "int8", 128)  # type: ignore[attr-defined]
    for typed in ("stage=pretrain", "+stage=pretrain", "experiment=pretrain_400m", "sweep=lr_nano"):
        assert with_quickstart([typed]) == [typed]
    plain = experiment_of(*with_quickstart(["stage=pretrain"]))
    assert (plain.name, plain.quantize.type, plain.model.hidden_size) == ("pretrain", "none", 64)  # type: ignore[attr-defined]
    assert stage(plain, "pretrain").optimizer.type == "adamw"
    assert stage(plain, "pretrain").budget.tokens is None


def test_a_key_typed_beside_the_quickstart_changes_it(experiment_of: Compose) -> None:
    from lmforge.verbs._arguments import with_quickstart

    made = experiment_of(*with_quickstart(["stage.dpo.beta=0.2", "model=nano"]))
    assert (made.name, stage(made, "dpo").beta, made.model.hidden_size) == ("quickstart", 0.2, 64)  # type: ignore[attr-defined]


def test_a_stage_typed_beside_an_experiment_replaces_its_stages(experiment_of: Compose) -> None:
    made = experiment_of("experiment=smoke", "stage=pretrain")
    assert [one.name for one in made.stages] == ["pretrain"]
    assert stage(made, "pretrain").budget.steps == 20


def test_an_alias_is_the_same_stage_under_another_name(experiment_of: Compose) -> None:
    made = experiment_of("experiment=anneal_nano")
    assert [(one.name, one.stage.type) for one in made.stages] == [("pretrain", "pretrain"), ("anneal", "pretrain")]
    first, second = stage(made, "pretrain"), stage(made, "anneal")
    assert (first.budget.tokens, second.budget.tokens) == (1_000_000, 200_000)
    assert (first.optimizer.schedule.type, second.optimizer.schedule.type, second.optimizer.schedule.final) == ("constant", "linear", 0.0)
    assert stage(experiment_of("experiment=anneal_nano", "stage.anneal.optimizer.lr=0.5"), "anneal").optimizer.lr == 0.5


@pytest.mark.parametrize(("typed", "kept"), [("tokens=5", {"tokens": 5}), ("steps=7", {"steps": 7}), ("flops=1e9", {"flops": 1e9})])
def test_a_higher_layer_replaces_the_whole_choice(typed: str, kept: dict[str, float], experiment_of: Compose) -> None:
    """Once over stage/pretrain.yaml, once over an experiment file."""
    for base in (["stage=pretrain"], ["experiment=quickstart"], ["experiment=pretrain_400m"]):
        budget = stage(experiment_of(*base, f"stage.pretrain.budget.{typed}"), "pretrain").budget
        assert {name: one for name in ("tokens", "steps", "flops", "tokens_per_parameter") if (one := getattr(budget, name)) is not None} == kept


def test_the_name_is_what_was_typed_or_the_experiment_or_the_stages(experiment_of: Compose) -> None:
    assert experiment_of("stage=[pretrain,sft]").name == "pretrain-sft"
    assert experiment_of("experiment=smoke").name == "smoke"
    assert experiment_of("experiment=smoke", "name=mine").name == "mine"


def test_a_users_folder_adds_options_and_wins_over_ours(experiment_of: Compose, tmp_path: Path) -> None:
    own = tmp_path / "options"
    for name, text in {
        "optimizer/mine": "defaults: [adamw, _self_]\nlr: 0.5\n",
        "model/nano": "defaults: [micro, _self_]\nhidden_size: 256\n",
        "experiment/mine": "# @package _global_\ndefaults:\n  - override /optimizer: mine\n  - override /stage: [pretrain]\nseed: 9\n",
    }.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / f"{name}.yaml").write_text(text)
    made = experiment_of("experiment=mine", config_dir=str(own))
    assert (stage(made, "pretrain").optimizer.type, stage(made, "pretrain").optimizer.lr, stage(made, "pretrain").seed) == ("adamw", 0.5, 9)
    assert made.model.hidden_size == 256  # type: ignore[attr-defined]
    assert stage(experiment_of("stage=pretrain", "stage.pretrain.optimizer=mine", config_dir=str(own)), "pretrain").optimizer.lr == 0.5
    with pytest.raises(ConfigError, match="unknown option 'mine'"):
        experiment_of("optimizer=mine")


@pytest.mark.parametrize(
    ("typed", "instead"),
    [
        (["stage=dpo", "optimizer.lr=1"], "stage.dpo.optimizer.lr=..."),
        (["stage=[pretrain,sft]", "stage.pretrain.optimizer.lr=1", "optimizer.lr=2"], "stage.pretrain.optimizer.lr=... stage.sft.optimizer.lr=..."),
        (["stage=sft", "stage.sft.optimizer=sgd", "optimizer.weight_decay=0.5"], "stage.sft.optimizer.weight_decay=..."),
        (["stage=sft", "stage.sft.optimizer=sgd", "optimizer=muon"], "stage.sft.optimizer=..."),
        (["stage=sft", "stage.sft.optimizer.schedule=wsd", "optimizer.schedule=cosine"], "stage.sft.optimizer.schedule=..."),
    ],
)
def test_an_override_that_no_stage_would_see_is_refused(typed: list[str], instead: str, experiment_of: Compose) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment_of("model=1b", *typed)
    assert instead in str(caught.value)


def test_an_override_that_one_stage_sees_is_taken(experiment_of: Compose) -> None:
    made = experiment_of("stage=[pretrain,sft]", "optimizer.lr=0.125")
    assert (stage(made, "pretrain").optimizer.lr, stage(made, "sft").optimizer.lr) == (0.125, 2e-5)


def test_composing_writes_nothing(experiment_of: Compose, tmp_path: Path) -> None:
    experiment_of("experiment=quickstart")
    assert list(tmp_path.iterdir()) == []
