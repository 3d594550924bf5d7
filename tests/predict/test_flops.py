"""FLOPs against what is published, and against sums over a model's own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import published
from lmforge.model.weights import count, weights
from lmforge.predict import flops
from lmforge.predict.job import shape

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 12}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("row", range(61))
def test_llm_foundry_mfu_and_hfu_from_tokens_per_second(shared: Path, row: int) -> None:
    """Its README prints both to 0.01 points, and tokens/s cut to a whole number."""
    one = published.rows(shared)[row]
    model = flops.full_square(one.params, one.shape.layers, one.shape.hidden, one.run.length)
    hardware = flops.recomputed(model) if one.run.checkpointing == "full" else model
    for per_token, said in ((model, one.mfu), (hardware, one.hfu)):
        assert 100 * flops.utilization(per_token, one.tokens_per_s, one.devices, published.PEAK) == pytest.approx(said, abs=0.01)


@pytest.mark.parametrize("row", range(4))
def test_korthikanti_mfu_and_hfu_from_iteration_time(shared: Path, row: int) -> None:
    """Equations 7 and 8 give the published columns; the 22B model's iteration time has two digits only."""
    table = json.loads((shared / "korthikanti2022.json").read_text())
    one = table["rows"][row]
    sizes = (one["global_batch"], table["seq_len"], one["layers"], one["hidden"], table["vocab"])
    seconds = one["iter_s_present"] * one["gpus"] * table["peak"]
    assert 100 * flops.korthikanti_model(*sizes) / seconds == pytest.approx(one["mfu_pub"], abs=0.2)
    assert 100 * flops.korthikanti_hardware(*sizes) / seconds == pytest.approx(one["hfu_pub"], abs=0.2)


def test_palm_mfu() -> None:
    """Chowdhery et al. 2022, appendix B: 238.3K tokens/s on 6,144 TPU v4 of 275 TFLOP/s are 46.2 %."""
    per_token = flops.full_square(540.35e9, 118, 48 * 256, 2048)
    assert 100 * flops.utilization(per_token, 238.3e3, 6144, 275e12) == pytest.approx(46.2, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_elements_are_those_of_the_weights(family: str) -> None:
    """Every matrix of the body is in one product, experts by the share that a token meets."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = {**SMALL, "num_key_value_heads": 2, **(experts if family == "qwen3_moe" else {}), "model_type": family}
    if family in ("gpt2", "gpt_neox"):
        config |= {"num_key_value_heads": 4}
    found = shape(config)
    body = [one for one in weights(config) if one.role == "body" and len(one.shape) > 1]
    numel = {one.name: one.count for one in body}
    for one in body:
        for size in one.shape:
            numel[one.name] *= size
    assert flops.layer_elements(found) == pytest.approx(sum(numel[one.name] * one.active for one in body))
    assert flops.layer_elements(found, active=False) == pytest.approx(sum(numel.values()))


def test_the_house_convention_is_hardware_flops_but_for_lookups() -> None:
    """6N + 6LdT counts the embedding as a product and norms as matrices; without those it is what is computed with scores kept in memory."""
    config = {**SMALL, "model_type": "llama"}
    found, counted = shape(config), count(config)
    made = flops.hardware(found, 64, logits=1.0, causal=True, stored_scores=True).total
    norms = counted.non_embedding - flops.layer_elements(found)
    assert flops.house(counted.active, 3, 48, 64) - 6 * (counted.embedding + norms) == pytest.approx(made)


def test_full_checkpointing_leaves_out_each_layers_last_product() -> None:
    found = shape({**SMALL, "model_type": "llama"})
    once = flops.hardware(found, 64, logits=1.0, causal=True, checkpointing="full")
    assert once.recompute == pytest.approx(once.forward - 2 * 3 * 48 * 80)
    norm = flops.hardware(shape({**SMALL, "model_type": "olmo2"}), 64, logits=1.0, causal=True, checkpointing="full")
    assert norm.recompute == norm.forward
    assert flops.hardware(found, 64, logits=1.0, causal=True, checkpointing="selective").recompute == 0


def test_seven_billion_on_twenty_tokens_each() -> None:
    """6ND: 7e9 parameters on 140e9 tokens."""
    assert flops.house(7e9, 0, 0, 0) * 140e9 == pytest.approx(5.88e21)
