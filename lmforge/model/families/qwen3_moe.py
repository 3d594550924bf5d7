"""Qwen 3 MoE (Yang et al. 2025): Qwen 3 with many small experts; some layers may stay dense."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import attention, ends, experts, gated_mlp, norms, query_key_norms

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,  # of the dense layers
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "moe_intermediate_size": 768,  # of one expert
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
}


@family("qwen3_moe", DEFAULTS, {"num_experts": "num_local_experts"})
def weights(sizes: Sizes) -> Iterator[Weight]:
    bias, dense_only = sizes.more["attention_bias"], sizes.more["mlp_only_layers"] or ()
    step, number = sizes.more["decoder_sparse_step"], sizes.more["num_local_experts"]
    sparse = sum(number > 0 and layer not in dense_only and (layer + 1) % step == 0 for layer in range(sizes.num_hidden_layers))
    yield from ends(sizes)
    yield from attention(sizes, bias, out_bias=bias)
    yield from query_key_norms(sizes, sizes.head_dim, sizes.head_dim)
    if sparse:
        yield from experts(sizes, sparse, sizes.more["moe_intermediate_size"])
    if sparse < sizes.num_hidden_layers:
        yield from gated_mlp(sizes, sizes.num_hidden_layers - sparse)
    yield from norms(sizes, "input_layernorm", "post_attention_layernorm")
