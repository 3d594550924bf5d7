"""FLOPs of a transformer by kernel class, and the conventions that published utilizations use.

A FLOP is one multiply or one add; a product of [M, K] with [K, N] is 2MKN. Counts are per token unless a name says otherwise. The house convention,
which budgets and plans are stated in, is `house`: 6N + 6LdT.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from lmforge.predict.job import Shape

Checkpointing = Literal["none", "selective", "full"]
FLASH_BACKWARD = 2.5  # five products for forward's two, for the scores are computed again (Dao 2023, arXiv 2307.08691, section 3.1)
STORED_BACKWARD = 2.0  # where the scores lie in memory
ENDS_IN_NORM = ("olmo2", "gemma2")  # a norm takes the layer's last product, so that backward needs it


class Product(NamedTuple):
    """One matrix product of a layer's forward pass: [tokens * share, k] x [k, n], `times` of them."""

    name: Literal["qkv", "o", "router", "up", "down"]
    k: int
    n: int
    times: float = 1.0
    share: float = 1.0


def attention_products(shape: Shape) -> Iterator[Product]:
    """Queries, keys and values as one product: the FLOPs are the same whether a family fuses them."""
    yield Product("qkv", shape.hidden, shape.queries + 2 * shape.keys)
    yield Product("o", shape.queries, shape.hidden)


def dense_products(shape: Shape) -> Iterator[Product]:
    """A feed-forward of two matrices, or of three where it is gated."""
    yield Product("up", shape.hidden, shape.intermediate, 2 if shape.gated else 1)
    yield Product("down", shape.intermediate, shape.hidden)


def expert_products(shape: Shape) -> Iterator[Product]:
    """Each expert takes its share of the tokens, as if they were spread evenly."""
    share = shape.top_experts / shape.experts
    yield Product("router", shape.hidden, shape.experts)
    yield Product("up", shape.hidden, shape.expert_width, 2 * shape.experts, share)
    yield Product("down", shape.expert_width, shape.hidden, shape.experts, share)


def layer_elements(shape: Shape, *, active: bool = True) -> float:
    """Matrix elements of all layers: those that one token meets, or all of them."""

    def elements(products: Iterator[Product]) -> float:
        return sum(one.k * one.n * one.times * (one.share if active else 1.0) for one in products)

    dense, sparse = shape.layers - shape.sparse_layers, shape.sparse_layers
    found = shape.layers * elements(attention_products(shape)) + dense * elements(dense_products(shape))
    return found + (sparse * elements(expert_products(shape)) if sparse else 0.0)


def last_products(shape: Shape) -> float:
    """Of them, those of each layer's last product that one token meets: `down`."""
    dense = (shape.layers - shape.sparse_layers) * shape.intermediate
    return shape.hidden * (dense + shape.sparse_layers * shape.expert_width * shape.top_experts)


def scores_flops(shape: Shape, length: int, *, causal: bool) -> float:
    """Forward FLOPs a token of all layers' attention, QK^T and PV: 4 L d T, half of it where only the past is computed."""
    return 4 * shape.layers * shape.queries * length * (0.5 if causal else 1.0)


class Flops(NamedTuple):
    """FLOPs a token that the machine does, by pass; attention's are in them."""

    forward: float
    backward: float
    recompute: float
    head: float  # forward and backward of the output layer

    @property
    def total(self) -> float:
        return sum(self)


def hardware(
    shape: Shape, length: int, *, logits: float, causal: bool, checkpointing: Checkpointing = "none", stored_scores: bool = False, frozen: bool = False,
    early_stop: bool = True, backward: bool = True,
) -> Flops:  # fmt: skip
    """What is really computed for a token of a sequence of `length`; `logits` is the share of tokens whose logits are made.

    Recomputation: `full` repeats each layer's forward up to the last tensor that backward needs (torch >= 2.1's early stop), so not its last product
    where nothing but a sum takes it; `selective` (training/lowering.py) repeats neither products nor attention. Where the weights are frozen (an
    adapter's base) backward is one product instead of two. The embedding is a lookup; the head is a product, tied or not.
    """
    body, head = 2 * layer_elements(shape), 2 * shape.hidden * shape.vocab * logits
    scores = scores_flops(shape, length, causal=causal)
    if not backward:
        return Flops(body + scores, 0.0, 0.0, head)
    again = body + scores - (2 * last_products(shape) if early_stop and shape.kind not in ENDS_IN_NORM else 0.0)
    products = 1 if frozen else 2
    back = products * body + scores * (STORED_BACKWARD if stored_scores else FLASH_BACKWARD)
    return Flops(body + scores, back, again if checkpointing == "full" else 0.0, head * (1 + products))


# Conventions: FLOPs a token of training. Every printed utilization names its own.


def house(active_params: float, layers: int, width: int, length: int) -> float:
    """6N + 6LdT: N active parameters, embeddings included; causal attention, half of the square (d = heads x head_dim, T = length)."""
    return 6 * active_params + 6 * layers * width * length


def full_square(params: float, layers: int, width: int, length: int) -> float:
    """6N + 12LdT: attention's whole square, causal or not.

    llm-foundry (scripts/train/benchmarking: N all parameters, learned positions too), nanoGPT, and PaLM (Chowdhery et al. 2022, appendix B, with N
    without embeddings).
    """
    return 6 * params + 12 * layers * width * length


def recomputed(model_flops: float) -> float:
    """HFU's FLOPs under full checkpointing as llm-foundry and PaLM count them: forward is a third and comes once more, so 4/3."""
    return model_flops * 4 / 3


def korthikanti_model(batch: int, length: int, layers: int, hidden: int, vocab: int) -> float:
    """Korthikanti et al. 2022 (arXiv 2205.05198), equation 7: model FLOPs an iteration, 72 B s L h^2 (1 + s/6h + V/12hL); the whole square."""
    return 72 * batch * length * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (12 * hidden * layers))


def korthikanti_hardware(batch: int, length: int, layers: int, hidden: int, vocab: int) -> float:
    """Equation 8, under selective recomputation: 72 B s L h^2 (1 + s/3h + V/12hL).

    The printed formula counts attention twice where forward, backward and one more forward are 4/3; the published HFU column follows the print.
    """
    return 72 * batch * length * layers * hidden**2 * (1 + length / (3 * hidden) + vocab / (12 * hidden * layers))


def utilization(flops_per_token: float, tokens_per_s: float, devices: int, peak_flops: float) -> float:
    """MFU where the FLOPs are the model's, HFU where they are the hardware's."""
    return flops_per_token * tokens_per_s / (devices * peak_flops)
