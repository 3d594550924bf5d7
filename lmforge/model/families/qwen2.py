"""Qwen 2 and 2.5 (Yang et al. 2024): Llama's layout with biases on queries, keys and values only."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import BY_HEADS, attention, ends, gated_mlp, norms

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


@family("qwen2", DEFAULTS, splits=BY_HEADS)
def weights(sizes: Sizes) -> Iterator[Weight]:
    yield from ends(sizes)
    yield from attention(sizes, bias=True, out_bias=False)
    yield from gated_mlp(sizes, sizes.num_hidden_layers)
    yield from norms(sizes, "input_layernorm", "post_attention_layernorm")
