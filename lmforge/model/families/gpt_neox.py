"""GPT-NeoX and Pythia (Black et al. 2022): fused queries, keys and values, LayerNorm, an untied head."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import head, linear

DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
LAYER = "gpt_neox.layers.{layer}"


def layer_norm(name: str, width: int, count: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,), count)
    yield Weight(f"{name}.bias", (width,), count)


@family("gpt_neox", DEFAULTS)
def weights(sizes: Sizes) -> Iterator[Weight]:
    width, inner, count = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    bias = sizes.more["attention_bias"]
    yield Weight("gpt_neox.embed_in.weight", (sizes.vocab_size, width), 1, role="embedding")
    yield from layer_norm(f"{LAYER}.input_layernorm", width, count)
    yield from layer_norm(f"{LAYER}.post_attention_layernorm", width, count)
    yield from linear(f"{LAYER}.attention.query_key_value", 3 * width, width, count, bias)
    yield from linear(f"{LAYER}.attention.dense", width, width, count, bias)
    yield from linear(f"{LAYER}.mlp.dense_h_to_4h", inner, width, count, bias=True)
    yield from linear(f"{LAYER}.mlp.dense_4h_to_h", width, inner, count, bias=True)
    yield from layer_norm("gpt_neox.final_layer_norm", width, 1)
    yield from head(sizes)
