"""Mistral 7B (Jiang et al. 2023): Llama's layout with grouped queries and no biases."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import BY_HEADS, attention, ends, gated_mlp, norms

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
}


@family("mistral", DEFAULTS, splits=BY_HEADS)
def weights(sizes: Sizes) -> Iterator[Weight]:
    yield from ends(sizes)
    yield from attention(sizes, bias=False, out_bias=False)
    yield from gated_mlp(sizes, sizes.num_hidden_layers)
    yield from norms(sizes, "input_layernorm", "post_attention_layernorm")
