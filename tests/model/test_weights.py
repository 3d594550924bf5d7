"""Counts without torch against transformers' own models: names, shapes and totals, family by family."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import ConfigError
from lmforge.model.families import known
from lmforge.model.weights import count, max_positions, nearest_divisors, vocab_size, weights

SMALL = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 33}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MOE = {**GROUPED, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES: list[dict[str, Any]] = [
    {"model_type": "llama", **SMALL},
    {"model_type": "llama", **GROUPED, "tie_word_embeddings": True, "attention_bias": True},
    {"model_type": "llama", **GROUPED, "head_dim": 14, "mlp_bias": True},
    {"model_type": "mistral", **GROUPED},
    {"model_type": "mistral", **SMALL, "num_key_value_heads": 6, "head_dim": 10, "tie_word_embeddings": True},
    {"model_type": "qwen2", **GROUPED, "use_sliding_window": True, "max_window_layers": 1},
    {"model_type": "qwen2", **SMALL, "num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": True},
    {"model_type": "qwen3", **GROUPED},
    {"model_type": "qwen3", **GROUPED, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    {"model_type": "gemma2", **GROUPED},
    {"model_type": "gemma2", **GROUPED, "head_dim": 12, "attention_bias": True, "tie_word_embeddings": False},
    {"model_type": "olmo2", **SMALL},
    {"model_type": "olmo2", **GROUPED, "attention_bias": True, "tie_word_embeddings": True},
    {"model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 19},
    {"model_type": "gpt2", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "n_inner": 50, "tie_word_embeddings": False},
    {"model_type": "gpt_neox", **SMALL},
    {"model_type": "gpt_neox", **SMALL, "attention_bias": False, "tie_word_embeddings": True},
    {"model_type": "mixtral", **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 3},
    {"model_type": "mixtral", **SMALL, "num_key_value_heads": 1, "num_experts": 3, "head_dim": 10, "tie_word_embeddings": True},
    {"model_type": "qwen3_moe", **MOE, "norm_topk_prob": True},
    {"model_type": "qwen3_moe", **MOE, "decoder_sparse_step": 2, "attention_bias": True, "head_dim": 10},
    {"model_type": "qwen3_moe", **MOE, "mlp_only_layers": [0, 2], "tie_word_embeddings": True},
    {"model_type": "qwen3_moe", **MOE, "mlp_only_layers": [0, 1, 2]},
    {"model_type": "qwen3_moe", **SMALL, "num_key_value_heads": 6, "num_local_experts": 4, "num_experts_per_tok": 1},
]
TWO_LAYERS = {"gpt2": {"n_layer": 2}}  # the families' defaults are large; a layer count is all that is cut


def transformers_model(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))


def folded(model: Any) -> Counter[tuple[str, tuple[int, ...]]]:
    """Named parameters with their layer number replaced, and how often each name and shape occurs."""
    names = ((["{layer}" if part.isdigit() else part for part in name.split(".")], tuple(p.shape)) for name, p in model.named_parameters())
    return Counter((".".join(parts), shape) for parts, shape in names)


def expected(config: dict[str, Any]) -> Counter[tuple[str, tuple[int, ...]]]:
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for weight in weights(config):
        found[weight.name, weight.shape] += weight.count
    return found


@pytest.mark.parametrize("config", CASES, ids=lambda config: config["model_type"])
def test_names_shapes_and_totals_are_those_of_transformers(config: dict[str, Any]) -> None:
    model = transformers_model(config)
    assert expected(config) == folded(model)
    counted = count(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.total == counted.embedding + counted.head + counted.non_embedding
    assert vocab_size(config) == model.config.vocab_size
    assert max_positions(config) == model.config.max_position_embeddings
    assert counted.layers == model.config.num_hidden_layers


@pytest.mark.parametrize("model_type", sorted(known()))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A config.json that says nothing but its type, save two layers to keep the model small."""
    config = {"model_type": model_type, **TWO_LAYERS.get(model_type, {"num_hidden_layers": 2})}
    assert expected(config) == folded(transformers_model(config))
    whole = transformers_model({"model_type": model_type}).config
    assert count({"model_type": model_type}).layers == whole.num_hidden_layers
    assert max_positions({"model_type": model_type}) == whole.max_position_embeddings


def test_a_config_as_transformers_5_saves_it_counts_the_same(tmp_path: Path) -> None:
    import json

    for config in CASES:
        model = transformers_model(config)
        model.config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert count(saved) == count(config)


def test_active_parameters_of_a_mixture_are_those_one_token_runs_through() -> None:
    mixtral = {"model_type": "mixtral"}
    assert count(mixtral).total == 46_702_792_704  # Mixtral 8x7B, as published
    assert count(mixtral).active == 12_879_925_248
    dense = count({"model_type": "mistral", "max_position_embeddings": 32768})
    assert dense.active == dense.total == 7_241_732_096


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({"model_type": "gpt2"}, 124_439_808),
        ({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
        ({"model_type": "llama", "max_position_embeddings": 4096}, 6_738_415_616),
        ({"model_type": "gemma2"}, 2_614_341_888),
        ({"model_type": "gpt_neox", "vocab_size": 50432}, 20_554_567_680),
        (
            {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
            | {"num_attention_heads": 28, "num_key_value_heads": 4},
            7_615_616_512,  # Qwen2.5-7B
        ),
        (
            {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128},
            30_532_122_624,  # Qwen3-30B-A3B
        ),
    ],
)
def test_published_totals(config: dict[str, Any], total: int) -> None:
    assert count(config).total == total


def test_published_table() -> None:
    table = Path(__file__).parents[2].parent / "shared" / "data" / "model_shapes.csv"
    if not table.is_file():
        pytest.skip(f"{table} is not here: a published table that is not part of this repository")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert rows
    for row in rows:
        config = {
            "model_type": "mistral" if row["model"].startswith("Mistral") else "llama",
            "vocab_size": int(row["vocab"]),
            "hidden_size": int(row["d_model"]),
            "intermediate_size": int(row["ffn"]),
            "num_hidden_layers": int(row["n_layer"]),
            "num_attention_heads": int(row["n_head"]),
            "num_key_value_heads": int(row["n_kv_head"]),
            "head_dim": int(row["head_dim"]),
            "tie_word_embeddings": row["tied"] == "True",
        }
        found = count(config)
        assert found.total == int(row["params_computed"]) == int(row["params_published"] or row["params_computed"]), row["model"]
        assert found.active == int(row["active_params_computed"]), row["model"]
        assert found.non_embedding == int(row["non_embedding_computed"]), row["model"]
        assert found.attention_width == int(row["n_head"]) * int(row["head_dim"])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "mamba2"}, "known: gemma2, gpt2, gpt_neox, llama"),
        ({}, "model_type None is not a known family"),
        ({"model_type": "llama", "hidden_size": 4096.0}, "hidden_size must be a whole number above 0, got 4096.0"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers must be a whole number above 0"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 24}, "take 20 or 25 heads"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "take 4 or 8 key-value heads"),
        ({"model_type": "gpt2", "n_embd": 64, "hidden_size": 32}, "hidden_size 32 contradicts hidden_size 64"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "9 is more than the 8 experts"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "needs an encoder"),
        ({"model_type": "llama", "per_layer_config": {"0": {"hidden_size": 8}}}, "different shapes"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        weights(config)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nearest_divisors_lie_around_the_number_asked_for() -> None:
    assert nearest_divisors(768, 10) == "8 or 12"
    assert nearest_divisors(768, 12) == "12"
    assert nearest_divisors(7, 3) == "1 or 7"
    assert nearest_divisors(8, 100) == "8"
