"""Every family that a plan can count is one that runs: it builds, and packed documents never see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmforge.model.build import from_scratch
from lmforge.model.families import known

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama", **GROUPED},
    {"model_type": "mistral", **GROUPED},
    {"model_type": "mistral", **GROUPED, "sliding_window": 4},
    {"model_type": "mixtral", **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "qwen2", **GROUPED},
    {"model_type": "qwen2", **GROUPED, **WINDOW},
    {"model_type": "qwen3", **GROUPED},
    {"model_type": "qwen3_moe", **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    {"model_type": "gemma2", **GROUPED, "head_dim": 8},
    {"model_type": "gemma2", **GROUPED, "head_dim": 8, "sliding_window": 4},
    {"model_type": "olmo2", **GROUPED},
    {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    {"model_type": "gpt_neox", **SIZES},
]
DOCUMENTS = [torch.arange(length) * 7 % 90 + 1 for length in (9, 14, 5)]


def test_every_known_family_is_tried() -> None:
    assert {config["model_type"] for config in CONFIGS} == set(known())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"] + ("-window" if config.get("sliding_window") == 4 else ""))
def test_packed_documents_are_as_if_alone(config: dict[str, Any]) -> None:
    """A row as the trainer gives it (position ids that start again, no mask, no cache) against each document by itself."""
    model: Any = from_scratch({**config, **IDS, "initializer_range": 0.1}, 0).eval()

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False).logits[0]

    row = torch.cat(DOCUMENTS)
    alone = torch.cat([logits(document, torch.arange(len(document))) for document in DOCUMENTS])
    packed = logits(row, torch.cat([torch.arange(len(document)) for document in DOCUMENTS]))
    assert (packed - alone).abs().max() < 1e-5
    first = len(DOCUMENTS[0])
    leaking = logits(row, torch.arange(len(row)))  # one long document: this test would see a leak
    assert (leaking[:first] - alone[:first]).abs().max() < 1e-5
    assert (leaking[first:] - alone[first:]).abs().max() > 1e-2
