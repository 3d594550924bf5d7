"""expand: what the steps of a pipeline are, and what each takes from which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import ConfigError, PlanError
from lmforge.plan import Plan

PlanOf = Callable[..., Plan]


def wiring(plan: Plan) -> dict[str, list[str]]:
    """Each step with what it takes, as `kind<-step`."""
    return {step.name: [f"{one.kind}<-{one.step}" for one in step.inputs] for step in plan.steps}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that will do to plan from."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_pipeline_from_scratch_shares_its_data_and_tokenizer(plan_of: PlanOf, rows: Path) -> None:
    plan = plan_of("stage=[pretrain,sft,dpo]", "data=text", f"data.path={rows}", "quantize=int8", "eval.after=all", until="expand")
    assert wiring(plan) == {
        "data": [],
        "tokenizer": ["corpus<-data"],
        "tokens.text": ["corpus<-data", "tokenizer<-tokenizer"],
        "pretrain": ["tokenizer<-tokenizer", "tokens:text<-tokens.text"],
        "tokens.preference": ["corpus<-data", "tokenizer<-tokenizer"],
        "eval.pretrain": ["checkpoint<-pretrain", "tokens:text<-tokens.text", "tokens:chat<-tokens.chat", "tokens:preference<-tokens.preference"],
        "tokens.chat": ["corpus<-data", "tokenizer<-tokenizer"],
        "sft": ["checkpoint<-pretrain", "tokens:chat<-tokens.chat"],
        "eval.sft": ["checkpoint<-sft", "tokens:text<-tokens.text", "tokens:chat<-tokens.chat", "tokens:preference<-tokens.preference"],
        "dpo.reference": ["checkpoint<-sft", "tokens:preference<-tokens.preference"],
        "dpo": ["checkpoint<-sft", "tokens:preference<-tokens.preference", "reference<-dpo.reference"],
        "eval.dpo": ["checkpoint<-dpo", "tokens:text<-tokens.text", "tokens:chat<-tokens.chat", "tokens:preference<-tokens.preference"],
        "quantize": ["checkpoint<-dpo"],
        "eval.quantize": ["checkpoint<-quantize", "tokens:text<-tokens.text", "tokens:chat<-tokens.chat", "tokens:preference<-tokens.preference"],
    }


def test_steps_come_after_what_they_take(plan_of: PlanOf) -> None:
    seen: set[str] = set()
    for step in plan_of("experiment=quickstart", until="expand").steps:
        assert {one.step for one in step.inputs} <= seen
        seen.add(step.name)


def test_only_the_last_checkpoint_is_measured_where_asked(plan_of: PlanOf) -> None:
    plan = plan_of("stage=[pretrain,sft]", "eval.after=last", until="expand")
    assert [step.name for step in plan.steps if step.group == "eval"] == ["eval.sft"]


def test_no_evaluation_leaves_no_step_and_no_tokens_for_it(plan_of: PlanOf) -> None:
    assert [step.name for step in plan_of("stage=pretrain", "eval=none", until="expand").steps] == ["data", "tokenizer", "tokens.text", "pretrain"]


def test_baselines_are_measured_once(plan_of: PlanOf) -> None:
    specs: dict[str, Any] = {step.name: step.spec for step in plan_of("stage=[pretrain,sft]", "eval.after=all", until="expand").steps}
    assert (specs["eval.pretrain"].bigram, specs["eval.sft"].bigram) == (True, False)


def test_a_view_that_the_data_lacks_is_not_measured(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A sentence.\n" * 40)
    plan = plan_of("stage=pretrain", "data=text", f"data.path={tmp_path / 'text.txt'}", until="expand")
    assert wiring(plan)["eval.pretrain"] == ["checkpoint<-pretrain", "tokens:text<-tokens.text"]


def test_weights_bring_their_own_tokenizer(plan_of: PlanOf, checkpoint: Path, rows: Path) -> None:
    plan = plan_of("stage=dpo", f"stage.dpo.init_from={checkpoint}", "data=text", f"data.path={rows}", "eval=none", until="expand")
    assert wiring(plan) == {
        "weights": [],
        "data": [],
        "tokens.preference": ["corpus<-data", "tokenizer<-weights"],
        "dpo.reference": ["checkpoint<-weights", "tokens:preference<-tokens.preference"],
        "dpo": ["checkpoint<-weights", "tokens:preference<-tokens.preference", "reference<-dpo.reference"],
    }


def test_init_from_names_the_model_too(plan_of: PlanOf, checkpoint: Path, rows: Path) -> None:
    plan = plan_of("stage=sft", f"stage.sft.init_from={checkpoint}", "data=text", f"data.path={rows}")
    assert plan.experiment.model.config()["hidden_size"] == 32
    assert plan.step("sft").cost.params_total == 512 * 32 * 2 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32


def test_a_model_with_weights_starts_from_them_unless_it_is_pretrained_anew(plan_of: PlanOf) -> None:
    sft = plan_of("stage=sft", "model=1b", until="expand")
    assert sft.step("weights").spec.source == "allenai/OLMo-2-0425-1B"  # type: ignore[attr-defined]
    anew = wiring(plan_of("stage=[pretrain,sft]", "model=1b", "eval=none", until="expand"))
    assert "weights" not in anew
    assert anew["sft"][0] == "checkpoint<-pretrain"
    assert anew["tokenizer"] == []  # the model's own, fetched, not trained


def test_a_stage_with_other_data_has_a_data_step_of_its_own_and_the_same_tokenizer(plan_of: PlanOf, rows: Path) -> None:
    plan = wiring(plan_of("stage=[pretrain,sft]", "stage.sft.data=text", f"stage.sft.data.path={rows}", "eval=none", until="expand"))
    assert plan["tokens.chat"] == ["corpus<-data.text", "tokenizer<-tokenizer"]
    assert plan["tokenizer"] == ["corpus<-data"]


def test_the_same_stage_twice_goes_on_from_the_first(plan_of: PlanOf) -> None:
    plan = wiring(plan_of("experiment=anneal_nano", "eval=none", until="expand"))
    assert plan["anneal"] == ["checkpoint<-pretrain", "tokenizer<-tokenizer", "tokens:text<-tokens.text"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_nothing_to_start_from_is_refused_with_what_to_type(stage: str, plan_of: PlanOf) -> None:
    with pytest.raises(PlanError, match="nothing to start from") as caught:
        plan_of(f"stage={stage}", until="expand")
    assert f"stage=[pretrain,{stage}]" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["stage=[dpo,pretrain]", "model=1b"], "stage"),
        (["stage=pretrain", "stage.pretrain.seq_len=257"], "stage.pretrain.seq_len"),
        (["stage=pretrain", "model.tokenizer.vocab_size=2049"], "model.tokenizer.vocab_size"),
        (["stage=pretrain", "parallel=ddp", "parallel.devices=9", "hardware=cpu"], "stage.pretrain.parallel.devices"),
        (["stage=pretrain", "stage.pretrain.model.hidden_size=32"], "stage.pretrain.model"),
    ],
)
def test_validate_names_the_key_of_a_broken_relation(overrides: list[str], where: str, plan_of: PlanOf) -> None:
    plan_of(*overrides, until="expand")
    with pytest.raises(PlanError) as caught:
        plan_of(*overrides, until="validate")
    assert [problem.where for problem in caught.value.problems] == [where]


def test_a_relation_that_just_holds_is_taken(plan_of: PlanOf) -> None:
    plan_of("stage=pretrain", "stage.pretrain.seq_len=256", "model.tokenizer.vocab_size=2048", "parallel=ddp", "parallel.devices=8", "hardware=cpu")


def test_all_broken_relations_are_told_at_once(plan_of: PlanOf) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of("stage=pretrain", "stage.pretrain.seq_len=512", "model.tokenizer.vocab_size=4096", until="validate")
    assert {problem.where for problem in caught.value.problems} == {"stage.pretrain.seq_len", "model.tokenizer.vocab_size"}


def test_an_unknown_pass_is_refused(plan_of: PlanOf) -> None:
    with pytest.raises(PlanError, match="did you mean 'place'"):
        plan_of("stage=pretrain", until="plac")


def test_the_wrong_order_names_the_one_that_works(plan_of: PlanOf) -> None:
    with pytest.raises((PlanError, ConfigError), match=r"stage=\[pretrain,sft\]"):
        plan_of("stage=[sft,pretrain]", "model=1b", until="validate")
