"""Configs of tiny models, one a family."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, **GROUPED, "model_type": "llama"},
    "mistral": {**SIZES, **GROUPED, "model_type": "mistral"},
    "qwen2": {**SIZES, **GROUPED, "model_type": "qwen2"},
    "qwen3": {**SIZES, **GROUPED, "model_type": "qwen3", "head_dim": 32},
    "olmo2": {**SIZES, **GROUPED, "model_type": "olmo2"},
    "gemma2": {**SIZES, "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gpt_neox": {**SIZES, "model_type": "gpt_neox", "tie_word_embeddings": False, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 1024, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    },
    "mixtral": {**SIZES, **GROUPED, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **SIZES, **GROUPED, "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "norm_topk_prob": False,
    },
}  # fmt: skip


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool = True) -> dict[str, Any]:
    """A Llama of any sizes."""
    return {
        **SIZES, "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate, "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 4096,
    }  # fmt: skip
