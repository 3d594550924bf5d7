"""Two config.json that mean one model have no differences, however they spell it; and every key that differs is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmforge.model.agree import Difference, differences
from lmforge.model.families import known

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_saved_model_agrees_with_the_config_it_was_made_from(config: dict[str, Any], tmp_path: Path, tokenizer_folder: Path) -> None:
    from lmforge.model.build import from_scratch, save

    save(from_scratch(config, 0), tokenizer_folder, tmp_path / "out")
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs["transformers_version"]
    assert theirs["eos_token_id"] is not None
    assert differences(config, theirs) == []
    assert differences(theirs, config) == []


@pytest.mark.parametrize("model_type", sorted(known()))
def test_a_silent_config_agrees_with_the_familys_defaults(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    whole = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    assert differences({"model_type": model_type}, whole) == []
    assert [one.key for one in differences({"model_type": model_type, "num_hidden_layers": 3}, whole)] == ["num_hidden_layers"]


def test_a_config_of_transformers_4_agrees() -> None:
    old = {
        **without(LLAMA, "rope_parameters"), "rope_theta": 500000, "rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.47.0",
        "use_cache": True, "eos_token_id": 1, "_name_or_path": "x",
    }  # fmt: skip
    assert differences(LLAMA, old) == []
    assert differences(LLAMA, {**old, "rope_theta": 1e4}) == [Difference("rope_theta", 500000.0, 1e4)]
    scaled = {**old, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert differences(LLAMA, scaled) == [Difference("rope_type", "default", "linear")]


def test_one_value_has_one_name() -> None:
    spelt = {"model_type": "gpt2", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    assert differences(GPT2, spelt) == []
    assert differences(GPT2, {**spelt, "max_position_embeddings": 128}) == [Difference("max_position_embeddings", 64, 128)]


@pytest.mark.parametrize(
    "changed",
    [{"rms_norm_eps": 1e-5}, {"attention_bias": True}, {"max_position_embeddings": 128}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2}],
    ids=lambda changed: next(iter(changed)),
)
def test_every_key_counts(changed: dict[str, Any]) -> None:
    ((key, theirs),) = changed.items()
    assert differences(LLAMA, {**LLAMA, **changed}) == [Difference(key, LLAMA[key], theirs)]


def test_another_family_is_one_difference() -> None:
    assert differences(LLAMA, GPT2) == [Difference("model_type", "llama", "gpt2")]
