"""What was typed into what Hydra takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmforge.compose.catalog import Catalog
from lmforge.compose.overrides import Typed, translate
from lmforge.errors import ConfigError

TABLE = [
    # typed, key as the user means it, what Hydra gets, whether it chooses an option
    ("model=nano", "model", "model=nano", True),
    ("+model=nano", "model", "model=nano", True),
    ("++model=nano", "model", "model=nano", True),
    ("stage=[pretrain,sft]", "stage", "stage=[pretrain,sft]", True),
    ("model=nano,micro", "model", "model=nano,micro", True),
    ("optimizer.schedule=wsd", "optimizer.schedule", "optimizer/schedule=wsd", True),
    ("optimizer/schedule=wsd", "optimizer.schedule", "optimizer/schedule=wsd", True),
    ("model.tokenizer=bpe", "model.tokenizer", "model/tokenizer=bpe", True),
    ("stage.sft.optimizer=muon", "stage.sft.optimizer", "+optimizer@stage.sft.optimizer=muon", True),
    ("stage.dpo.optimizer.schedule=wsd", "stage.dpo.optimizer.schedule", "+optimizer/schedule@stage.dpo.optimizer.schedule=wsd", True),
    ("stage.sft.data=pystdlib", "stage.sft.data", "+data@stage.sft.data=pystdlib", True),
    ("stage.anneal.parallel=ddp", "stage.anneal.parallel", "+parallel@stage.anneal.parallel=ddp", True),
    ("optimizer.lr=1e-3", "optimizer.lr", "++optimizer.lr=1e-3", False),
    ("+optimizer.lr=1e-3", "optimizer.lr", "++optimizer.lr=1e-3", False),
    ("optimizer.lr=1e-3,3e-3", "optimizer.lr", "++optimizer.lr=1e-3,3e-3", False),
    ("optimizer={lr: 1}", "optimizer", "++optimizer={lr: 1}", False),
    ("stage.dpo.beta=0.2", "stage.dpo.beta", "++stage.dpo.beta=0.2", False),
    ("seed=3", "seed", "++seed=3", False),
    ("name='a=b'", "name", "++name='a=b'", False),
    ("~stage.sft.optimizer.lr", "stage.sft.optimizer.lr", "~stage.sft.optimizer.lr", True),
    ("optimizer@stage.sft.optimizer=muon", "stage.sft.optimizer", "optimizer@stage.sft.optimizer=muon", True),
    ("hydra/launcher=basic", "hydra/launcher", "hydra/launcher=basic", True),
    ("hydra.sweep.dir=x", "hydra.sweep.dir", "hydra.sweep.dir=x", False),
]


@pytest.mark.parametrize(("typed", "key", "hydra", "is_choice"), TABLE, ids=[row[0] for row in TABLE])
def test_an_override_is_translated(typed: str, key: str, hydra: str, is_choice: bool) -> None:
    (one,) = translate([typed], Catalog.of())
    assert (one.key, one.hydra, one.is_choice) == (key, hydra, is_choice)


@pytest.mark.parametrize("typed", [row[0] for row in TABLE if not row[0].startswith("hydra") and "," not in row[0]])
def test_a_sweep_job_reads_back_the_same_override(typed: str) -> None:
    """A launcher's process knows only what Hydra was given."""
    (one,) = translate([typed], Catalog.of())
    assert Typed.of_hydra(one.hydra) == one


def test_a_mapping_sets_each_of_its_keys() -> None:
    (one,) = translate(["stage.sft.budget={steps: 3, tokens: null}"], Catalog.of())
    assert one.keys == ("stage.sft.budget", "stage.sft.budget.steps", "stage.sft.budget.tokens")


def test_all_that_are_wrong_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        translate(["modl=nano", "optimizer=adamv", "model.x=[", "seed=1"], Catalog.of())
    assert [problem.where for problem in caught.value.problems] == ["modl", "optimizer", "model.x=["]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (
            "parallel=[fsdp,tp]",
            "parallel: [fsdp, tp] is a list, and there is one parallel at a time; one mesh has several axes: type parallel=fsdp parallel.tp=2",
        ),
        ("quantize=[none,int8]", "quantize: [none, int8] is a list, and there is one quantize at a time; choose one of int8, none"),
        ("stage.sft.data=[text,hf]", "stage.sft.data: [text, hf] is a list, and there is one data at a time; choose one of"),
    ],
)
def test_a_list_is_for_stages(typed: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate([typed], Catalog.of())
    assert str(caught.value).startswith(f"conf error: {told}")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("parallel=ddp parallel.tp=2", "parallel.tp: unknown key; type parallel=fsdp parallel.tp=2, or one of: "),
        ("stage.pretrain.parallel=ddp stage.pretrain.parallel.tp=2", "stage.pretrain.parallel.tp: unknown key; type stage.pretrain.parallel=fsdp stage.pre"),
        ("optimizer=sgd optimizer.beta1=0.5", "optimizer.beta1: unknown key; type optimizer=adam optimizer.beta1=0.5, or one of: "),
        ("hydra/launcher=submitit_slurm", "hydra/launcher: is for the points of a sweep, and this is one run, here; add -m, or leave it away"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_what_another_option_or_a_sweep_would_take(verb: str, typed: str, told: str, cli: Callable[..., Any]) -> None:
    if "launcher" in typed:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    answer = cli(verb, "stage=pretrain", *typed.split())
    assert (answer.code, answer.out, answer.written) == (2, "", [])
    assert answer.err.startswith(f"conf error: {told}")
    assert len(answer.err.splitlines()) == 1
