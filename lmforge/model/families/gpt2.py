"""GPT-2 and GPT-3's layout (Radford et al. 2019, Brown et al. 2020): learned positions, LayerNorm, GELU, biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.errors import ConfigError
from lmforge.model.families import Sizes, Weight, family
from lmforge.model.families.blocks import head

DEFAULTS = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "intermediate_size": None,  # 4 x hidden_size
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
ALIASES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
LAYER = "transformer.h.{layer}"


def conv1d(name: str, width: int, out: int, count: int) -> Iterator[Weight]:
    """transformers' Conv1D: a linear layer whose weight is stored (in, out)."""
    yield Weight(f"{name}.weight", (width, out), count)
    yield Weight(f"{name}.bias", (out,), count)


def layer_norm(name: str, width: int, count: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,), count)
    yield Weight(f"{name}.bias", (width,), count)


@family("gpt2", DEFAULTS, ALIASES)
def weights(sizes: Sizes) -> Iterator[Weight]:
    if sizes.more["add_cross_attention"]:
        raise ConfigError("config.json", "add_cross_attention: true makes a decoder that needs an encoder", "set it to false")
    width, inner, count = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    yield Weight("transformer.wte.weight", (sizes.vocab_size, width), 1, role="embedding")
    yield Weight("transformer.wpe.weight", (sizes.max_position_embeddings, width), 1, role="embedding")
    yield from layer_norm(f"{LAYER}.ln_1", width, count)
    yield from conv1d(f"{LAYER}.attn.c_attn", width, 3 * width, count)
    yield from conv1d(f"{LAYER}.attn.c_proj", width, width, count)
    yield from layer_norm(f"{LAYER}.ln_2", width, count)
    yield from conv1d(f"{LAYER}.mlp.c_fc", width, inner, count)
    yield from conv1d(f"{LAYER}.mlp.c_proj", inner, width, count)
    yield from layer_norm("transformer.ln_f", width, 1)
    yield from head(sizes)
