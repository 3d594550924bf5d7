"""Gemma 2 (Gemma Team 2024): four norms a layer, a head width of its own, tied embeddings."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import attention, ends, gated_mlp, norms

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}


@family("gemma2", DEFAULTS)
def weights(sizes: Sizes) -> Iterator[Weight]:
    bias = sizes.more["attention_bias"]
    yield from ends(sizes)
    yield from attention(sizes, bias, out_bias=bias)
    yield from gated_mlp(sizes, sizes.num_hidden_layers)
    yield from norms(sizes, "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
