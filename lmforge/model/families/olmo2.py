"""OLMo 2 (OLMo Team 2024): norms after each block, RMSNorm over all queries and all keys of a layer."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import WHOLE_HEADS, attention, ends, gated_mlp, norms, query_key_norms

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


@family("olmo2", DEFAULTS, splits=WHOLE_HEADS)
def weights(sizes: Sizes) -> Iterator[Weight]:
    bias = sizes.more["attention_bias"]
    yield from ends(sizes)
    yield from attention(sizes, bias, out_bias=bias)
    yield from query_key_norms(sizes, sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim)
    yield from gated_mlp(sizes, sizes.num_hidden_layers)
    yield from norms(sizes, "post_attention_layernorm", "post_feedforward_layernorm")
