"""Seconds of one micro-batch on one rank, by part: the kernels of its layers and of its output layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmforge.predict.flops import ENDS_IN_NORM, Checkpointing, Product, attention_products, dense_products, expert_products
from lmforge.predict.job import Shape
from lmforge.predict.kernels import NONE, Moved, Scores, Seconds, attention, cross_entropy, elementwise, launches, trained_product
from lmforge.predict.rates import Rates

Parts = Mapping[str, float]
SPLIT_OUTPUTS = ("qkv", "up")  # what tensor parallel splits by outputs; "o" and "down" by inputs (engine/tensor.py)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the kernels of a micro-batch see on one rank."""

    rows: float
    length: int
    width: int  # bytes of an element in products
    stream: int  # bytes of an element between them
    scores: Scores = "causal"
    backward: bool = True
    learns: bool = True  # False: weights without gradients, as under an adapter
    checkpointing: Checkpointing = "none"
    early_stop: bool = True  # recomputing ends at the last tensor that backward needs (torch >= 2.1)
    tp: int = 1
    whole_heads: bool = False  # tensor parallel splits matrices, but not attention
    compiled: bool = False
    chain: Moved | None = None  # bytes of the other kernels, where they are not those of transformers

    @property
    def tokens(self) -> float:
        return self.rows * self.length


@functools.lru_cache(maxsize=8192)
def layer(shape: Shape, run: Run, rates: Rates, sparse: bool = False) -> Parts:
    """One layer of a micro-batch; kept, for a search over meshes asks for the same one hundreds of times."""
    products, down = NONE, 0.0
    for one in (*attention_products(shape), *(expert_products(shape) if sparse else dense_products(shape))):
        found = _product(one, run, rates)
        products += found
        down += found.forward if one.name == "down" else 0.0
    heads = shape.heads if run.whole_heads else shape.heads / run.tp
    scores = attention(run.rows, run.length, heads, shape.head_dim, rates, run.width, run.scores).times(rates.residual)
    moved = run.chain or elementwise(shape, run.stream, run.width, fused=run.compiled, sparse=sparse)
    others = (moved.whole + moved.split.times(1 / run.tp)).times(run.tokens * rates.residual / rates.memory)
    if not run.backward:
        return {"forward": products.forward, "attention": scores.forward, "elementwise": others.forward}
    left_out = down if run.early_stop and shape.kind not in ENDS_IN_NORM else 0.0
    again = {"none": 0.0, "selective": others.forward, "full": products.forward + scores.forward + others.forward - left_out}
    return {
        "forward": products.forward,
        "backward": products.backward,
        "attention": sum(scores),
        "elementwise": sum(others),
        "recompute": again[run.checkpointing],
    }


def _product(one: Product, run: Run, rates: Rates) -> Seconds:
    k, n = one.k, one.n
    if one.name in SPLIT_OUTPUTS:
        n = -(-n // run.tp)
    elif one.name != "router":
        k = -(-k // run.tp)
    return trained_product(run.tokens * one.share, k, n, rates, run.width, weight_gradient=run.learns).times(one.times)


def head(shape: Shape, tokens: float, run: Run, rates: Rates, loss: Seconds | None = None) -> Parts:
    """The output layer and the loss for `tokens` of a micro-batch; `loss` in seconds, where it is not this house's."""
    if not tokens:
        return {}
    n = -(-shape.vocab // run.tp)
    made = trained_product(tokens, shape.hidden, n, rates, run.width, weight_gradient=run.learns)
    lost = (loss or cross_entropy(tokens * shape.vocab, rates, run.width)).times(rates.residual)
    return {"head": sum(made) + sum(lost) if run.backward else made.forward + lost.forward}


def micro_batch(shape: Shape, run: Run, rates: Rates, *, layers: float, head_tokens: float, loss: Seconds | None = None) -> dict[str, float]:
    """One micro-batch through `layers` of the model, and through the output layer where it has `head_tokens`; with what the host takes to start kernels."""
    sparse = layers * shape.sparse_layers / shape.layers
    found = total([(layer(shape, run, rates), layers - sparse)] + ([(layer(shape, run, rates, True), sparse)] if sparse else []))
    found |= head(shape, head_tokens, run, rates, loss)
    passes = (4 if run.checkpointing != "none" else 3) if run.backward else 1
    started = layers * launches(run.compiled, run.stream != run.width) * passes * rates.launch
    if not rates.gpu:  # one queue: the host that starts kernels is the device that runs them
        found["launch"] = started * rates.residual
    elif started > sum(found.values()):
        found["launch"] = started - sum(found.values())
    return found


def total(counted: Iterable[tuple[Parts, float]]) -> dict[str, float]:
    """Parts times their counts, added up."""
    found: dict[str, float] = {}
    for parts, count in counted:
        for name, seconds in parts.items():
            found[name] = found.get(name, 0.0) + seconds * count
    return found


def low_rank(tokens: float, inputs: int, outputs: int, rank: int, run: Run, rates: Rates) -> Seconds:
    """An adapter's own two products beside one frozen matrix, and scaling and adding what they give (PEFT: five elements of an output forward, four back)."""
    a = trained_product(tokens, inputs, rank, rates, run.width, weight_gradient=True)
    b = trained_product(tokens, rank, outputs, rates, run.width, weight_gradient=True)
    return a + b + Seconds(5.0, 4.0).times(tokens * outputs * run.width * rates.residual / rates.memory)
