"""Qwen 3, dense (Yang et al. 2025): no biases by default, RMSNorm on each head's queries and keys."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import WHOLE_HEADS, attention, ends, gated_mlp, norms, query_key_norms

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


@family("qwen3", DEFAULTS, splits=WHOLE_HEADS)
def weights(sizes: Sizes) -> Iterator[Weight]:
    bias = sizes.more["attention_bias"]
    yield from ends(sizes)
    yield from attention(sizes, bias, out_bias=bias)
    yield from query_key_norms(sizes, sizes.head_dim, sizes.head_dim)
    yield from gated_mlp(sizes, sizes.num_hidden_layers)
    yield from norms(sizes, "input_layernorm", "post_attention_layernorm")
