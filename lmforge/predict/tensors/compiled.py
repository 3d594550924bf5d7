"""A compiled decoder layer: what AOTAutograd's min-cut partitioner keeps of it for backward (torch/_functorch/partitioners.py).

Products and attention are not run again; chains of pointwise operations, norms with them, are. The kept bytes are those of torch's own partitioner for Llama in
float32, autocast and bfloat16 and for OLMo 2 (a test compares them); what backward makes besides is an upper bound, not compared.
"""

from __future__ import annotations

from lmforge.predict.job import Shape
from lmforge.predict.tensors.run import Run
from lmforge.predict.tensors.storage import Held
from lmforge.predict.tensors.walked import Walked

QKV, FEED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
MATRICES = frozenset({*QKV, "self_attn.o_proj", *FEED, "mlp.down_proj"})


def known(shape: Shape, run: Run) -> bool:
    """Whether the rule has been compared for such a layer, or follows from one that has."""
    adapter = run.adapter
    plain = adapter is None or not (adapter.four_bit or adapter.magnitude or adapter.dropout)
    whole = run.tp == 1 or run.by_heads
    return shape.kind in ("llama", "olmo2") and not shape.experts and shape.head_norm != "each" and run.checkpointing != "selective" and plain and whole


def kept(shape: Shape, run: Run) -> dict[str, int]:
    """Bytes by what they are: products' inputs where their weight is trained, attention's inputs and output, gate and up, the residual, what a norm takes
    from a product, norms' deviations, and autocast's copies of weights."""
    trained = run.adapter.targets if run.adapter else frozenset() if run.frozen else MATRICES
    tokens, wide, narrow, ranks = run.tokens, run.param, run.compute, run.tp
    x, q, k, feed = (tokens * size for size in (shape.hidden, shape.queries // ranks, shape.keys // ranks, shape.intermediate // ranks))
    keys = q if run.masked or run.attended else k  # repeated for every query head where there is a mask
    found = {
        "residual": x * wide,
        "output of o": x * narrow,
        "attention": (2 * q + 2 * keys) * narrow + tokens * (shape.heads // ranks) * 4,
        "mask": run.rows * run.length**2 * narrow if run.masked else sum(run.rows * one.masked * narrow for one in run.attended),
        "gate and up": 2 * feed * narrow,
        "deviations": (4 if shape.kind == "olmo2" else 2) * tokens * 4,
        "input of down": feed * narrow if "mlp.down_proj" in trained else 0,
        "weights": matrices(shape) // ranks * narrow if run.autocast else 0,
        "low rank": len(trained) * tokens * run.adapter.rank * narrow if run.adapter else 0,
    }
    if shape.kind == "olmo2":  # norms come after the products: the residuals are the products' inputs
        return found | {"before norms": (q + k + x) * narrow, "middle": x * wide}
    return found | {"inputs of q, k, v": x * narrow if trained & set(QKV) else 0, "inputs of gate, up": x * narrow if trained & set(FEED) else 0}


def matrices(shape: Shape) -> int:
    """Elements of a layer's matrices."""
    return shape.hidden * (2 * shape.queries + 2 * shape.keys + 3 * shape.intermediate)


def walked(shape: Shape, run: Run) -> Walked:
    """The layer as `walk.layer` has an eager one; backward holds the gradients of the feed-forward's products, and those of all weights, at once."""
    saved, x = sum(kept(shape, run).values()), run.tokens * shape.hidden * run.param
    feed = run.tokens * (shape.intermediate // run.tp) * run.compute
    low = sum(_low_rank(shape, name) for name in run.adapter.targets) * run.adapter.rank if run.adapter else 0
    elements = low if run.frozen else matrices(shape) // run.tp + 2 * shape.hidden
    grads = 0 if run.accumulated else elements * run.param
    stays = x if run.checkpointing == "full" else saved
    backward = Held(saved + x + 2 * feed + elements * run.param, 0, grads)
    return Walked(stays=stays, forward=Held(saved + x + feed), backward=backward, grads=grads, casts=0, lets_go=False)


def _low_rank(shape: Shape, name: str) -> int:
    """Inputs and outputs of a matrix together."""
    sizes = {QKV[0]: shape.hidden + shape.queries, QKV[1]: shape.hidden + shape.keys, QKV[2]: shape.hidden + shape.keys}
    return sizes.get(name, shape.queries + shape.hidden if name == "self_attn.o_proj" else shape.hidden + shape.intermediate)
