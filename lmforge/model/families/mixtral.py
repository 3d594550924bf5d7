"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import attention, ends, experts, norms

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@family("mixtral", DEFAULTS, {"num_experts": "num_local_experts"})
def weights(sizes: Sizes) -> Iterator[Weight]:
    yield from ends(sizes)
    yield from attention(sizes, bias=False, out_bias=False)
    yield from experts(sizes, sizes.num_hidden_layers, sizes.intermediate_size)
    yield from norms(sizes, "input_layernorm", "post_attention_layernorm")
