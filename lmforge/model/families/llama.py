"""Llama 1, 2 and 3 (Touvron et al. 2023): RMSNorm before each block, rotary positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import BY_HEADS, attention, ends, gated_mlp, norms

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


@family("llama", DEFAULTS, splits=BY_HEADS)
def weights(sizes: Sizes) -> Iterator[Weight]:
    bias = sizes.more["attention_bias"]
    yield from ends(sizes)
    yield from attention(sizes, bias, out_bias=bias)
    yield from gated_mlp(sizes, sizes.num_hidden_layers, sizes.more["mlp_bias"])
    yield from norms(sizes, "input_layernorm", "post_attention_layernorm")
