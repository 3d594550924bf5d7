"""What a plan counts is what PEFT counts, and what it names is what PEFT names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from lmforge.adapter.targets import chosen, linears, low_rank, unmatched
from lmforge.model.families import Weight, known
from lmforge.model.weights import weights
from tests.adapter import tiny

MIXED = ("mixtral", "qwen3_moe")  # PEFT's own all-linear takes their routers and stacked experts too, which are no layers
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def trained(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what PEFT trains, layer by layer."""
    return {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}


def spelled_out(found: list[Any]) -> dict[str, tuple[int, ...]]:
    return {one.name.replace("{layer}", str(layer)): one.shape for one in found for layer in range(one.count)}


def test_every_known_family_is_tried() -> None:
    assert {config["model_type"] for config in tiny.FAMILIES} == set(known())


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.by_family)
def test_all_linear_is_pefts(config: dict[str, Any], magnitude: bool) -> None:
    targets: Any = ATTENTION if config["model_type"] in MIXED else "all-linear"
    peft = get_peft_model(tiny.model(config), LoraConfig(r=3, target_modules=targets, use_dora=magnitude, task_type="CAUSAL_LM"))
    found = low_rank(chosen(linears(weights({**config, **tiny.IDS})), ("all-linear",)), 3, magnitude)
    assert spelled_out(found) == trained(peft)
    assert sum(one.numel for one in found) == peft.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("llama", ["mlp.down_proj", "lm_head"]), ("gpt2", ["c_proj"]), ("gpt2", ["attn.c_proj"]), ("gpt_neox", ["dense"])],
)
def test_named_targets_are_pefts(family: str, targets: list[str]) -> None:
    config = {**next(one for one in tiny.FAMILIES if one["model_type"] == family), "tie_word_embeddings": False}
    peft = get_peft_model(tiny.model(config), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    found = low_rank(chosen(linears(weights({**config, **tiny.IDS})), targets), 4, magnitude=False)
    assert spelled_out(found) == trained(peft)


@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.by_family)
@pytest.mark.parametrize(("name", "keys"), [("lora", {"init": "pissa", "r": 4}), ("dora", {}), ("qlora", {}), ("prompt_tuning", {})])
def test_what_is_attached_is_what_was_planned(config: dict[str, Any], name: str, keys: dict[str, Any]) -> None:
    node = tiny.adapter(name, **keys)
    attached, planned = node.attach(tiny.model(config)), node.trainable(weights({**config, **tiny.IDS}))
    assert spelled_out(planned) == trained(attached)
    assert sum(one.numel for one in planned) == attached.get_nb_trainable_parameters()[0]


def test_prompt_tuning_is_pefts() -> None:
    config = tiny.FAMILIES[0]
    peft = get_peft_model(tiny.model(config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    assert spelled_out(tiny.adapter("prompt_tuning", virtual_tokens=7).trainable(weights(config))) == trained(peft)


def test_rank_8_on_a_matrix_of_4096_squared() -> None:
    found = low_rank(linears([Weight("model.layers.{layer}.self_attn.q_proj.weight", (4096, 4096), 1)]), 8, magnitude=False)
    assert sum(one.numel for one in found) == 65_536


def test_all_weights_are_trained_without_an_adapter() -> None:
    config = tiny.FAMILIES[0]
    model = tiny.model(config)
    found = tiny.adapter("none").trainable(weights(config))
    assert sum(one.count * torch.Size(one.shape).numel() for one in found) == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("q_porj", "did you mean 'q_proj'?"),
        ("self_attn.qproj", "did you mean 'self_attn.q_proj'?"),
        ("c_attn", "all-linear, or some of: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"),
        ("embed_tokens", "all-linear, or some of"),
        ("_proj", "no linear layer of the model is named '_proj'"),
    ],
)
def test_a_target_that_matches_nothing_names_the_nearest(target: str, says: str) -> None:
    found = list(unmatched(linears(weights({**tiny.FAMILIES[0], "tie_word_embeddings": False})), ["v_proj", target], "adapter"))
    assert len(found) == 1
    assert found[0].where == "adapter.target_modules[1]"
    assert says in str(found[0])


def test_stacked_experts_and_their_router_are_no_layers() -> None:
    layers = linears(weights(next(one for one in tiny.FAMILIES if one["model_type"] == "mixtral")))
    assert sorted(one.module.rpartition(".")[2] for one in layers) == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
