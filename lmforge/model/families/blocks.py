"""Pieces that families share, with transformers' names and `nn.Linear`'s (out, in) shapes."""

from __future__ import annotations

from collections.abc import Iterator

from lmforge.model.families import Sizes, Split, Weight

LAYER = "model.layers.{layer}"

# Heads and hidden units are split over ranks: each layer sums once after attention and once after its MLP.
BY_HEADS: dict[str, Split] = {
    "model.embed_tokens": "vocabulary",
    f"{LAYER}.self_attn.q_proj": "column",
    f"{LAYER}.self_attn.k_proj": "column",
    f"{LAYER}.self_attn.v_proj": "column",
    f"{LAYER}.self_attn.o_proj": "row",
    f"{LAYER}.mlp.gate_proj": "column",
    f"{LAYER}.mlp.up_proj": "column",
    f"{LAYER}.mlp.down_proj": "row",
    "lm_head": "column_gathered",
}
# A norm between projection and attention: over all heads it needs all of them on every rank, and one shared by heads must learn from all of them.
# So attention itself is not split, only its matrices.
WHOLE_HEADS: dict[str, Split] = BY_HEADS | {
    f"{LAYER}.self_attn.q_proj": "column_gathered",
    f"{LAYER}.self_attn.k_proj": "column_gathered",
    f"{LAYER}.self_attn.v_proj": "column_gathered",
    f"{LAYER}.self_attn.o_proj": "row_from_whole",
}


def linear(name: str, out: int, width: int, count: int, bias: bool) -> Iterator[Weight]:
    """`nn.Linear(width, out, bias)`."""
    yield Weight(f"{name}.weight", (out, width), count)
    if bias:
        yield Weight(f"{name}.bias", (out,), count)


def ends(sizes: Sizes) -> Iterator[Weight]:
    """Token embedding, final norm, and the output head where it is not the embedding itself."""
    yield Weight("model.embed_tokens.weight", (sizes.vocab_size, sizes.hidden_size), 1, role="embedding")
    yield Weight("model.norm.weight", (sizes.hidden_size,), 1)
    yield from head(sizes)


def head(sizes: Sizes) -> Iterator[Weight]:
    """`lm_head`, absent where embeddings are tied."""
    if not sizes.tie_word_embeddings:
        yield Weight("lm_head.weight", (sizes.vocab_size, sizes.hidden_size), 1, role="head")


def attention(sizes: Sizes, bias: bool, out_bias: bool) -> Iterator[Weight]:
    """Grouped-query attention: query, key, value and output projections of every layer."""
    name, count = f"{LAYER}.self_attn", sizes.num_hidden_layers
    queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    yield from linear(f"{name}.q_proj", queries, sizes.hidden_size, count, bias)
    yield from linear(f"{name}.k_proj", keys, sizes.hidden_size, count, bias)
    yield from linear(f"{name}.v_proj", keys, sizes.hidden_size, count, bias)
    yield from linear(f"{name}.o_proj", sizes.hidden_size, queries, count, out_bias)


def query_key_norms(sizes: Sizes, queries: int, keys: int) -> Iterator[Weight]:
    """RMSNorms on queries and keys, of the given widths."""
    yield Weight(f"{LAYER}.self_attn.q_norm.weight", (queries,), sizes.num_hidden_layers)
    yield Weight(f"{LAYER}.self_attn.k_norm.weight", (keys,), sizes.num_hidden_layers)


def gated_mlp(sizes: Sizes, count: int, bias: bool = False) -> Iterator[Weight]:
    """SwiGLU or GeGLU feed-forward of `count` layers (Shazeer 2020)."""
    yield from linear(f"{LAYER}.mlp.gate_proj", sizes.intermediate_size, sizes.hidden_size, count, bias)
    yield from linear(f"{LAYER}.mlp.up_proj", sizes.intermediate_size, sizes.hidden_size, count, bias)
    yield from linear(f"{LAYER}.mlp.down_proj", sizes.hidden_size, sizes.intermediate_size, count, bias)


def experts(sizes: Sizes, count: int, width: int) -> Iterator[Weight]:
    """Router and experts of `count` layers; transformers 5 fuses all experts of a layer into two tensors."""
    number, top = sizes.more["num_local_experts"], sizes.more["num_experts_per_tok"]
    yield Weight(f"{LAYER}.mlp.gate.weight", (number, sizes.hidden_size), count)
    yield Weight(f"{LAYER}.mlp.experts.gate_up_proj", (number, 2 * width, sizes.hidden_size), count, active=top / number)
    yield Weight(f"{LAYER}.mlp.experts.down_proj", (number, sizes.hidden_size, width), count, active=top / number)


def norms(sizes: Sizes, *names: str) -> Iterator[Weight]:
    """RMSNorms over the hidden size, one of each name a layer."""
    for name in names:
        yield Weight(f"{LAYER}.{name}.weight", (sizes.hidden_size,), sizes.num_hidden_layers)
