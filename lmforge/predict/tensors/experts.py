"""A mixture of experts on a tape, as transformers 5.23 runs it by grouped products (integrations/moe.py, grouped_mm_experts_forward)."""

from __future__ import annotations

from lmforge.predict.tensors.decoder import Layer
from lmforge.predict.tensors.storage import OUT, Tensor

INDEX = 8  # bytes


def mixture(layer: Layer, h: Tensor) -> Tensor:
    """Each token's hidden state goes to `top_experts` of the experts; their outputs are weighted and added. How tokens fall does not change the sizes.

    Grouped products are no part of autocast: they run in the weights' dtype.
    """
    shape, tape, run = layer.shape, layer.tape, layer.run
    tokens, chosen = run.tokens, run.tokens * shape.top_experts
    shares = _router(layer, h)
    places = tape.leaf(3 * chosen, INDEX)  # the order by expert, the way back, the experts
    sorted_shares = tape.operation(chosen, shares.width, (shares,), (places,), gradients={id(shares): shares.nbytes})
    picked = tape.operation(chosen * shape.hidden, h.width, (h,), (places,), temporary=h.nbytes, gradients={id(h): h.nbytes})
    both = grouped(layer, picked, shape.hidden, 2 * shape.expert_width)
    tape.drop(picked)
    gate, up = (tape.share(both, both.count // 2) for _ in range(2))
    tape.split(both, (gate, up))
    tape.drop(both)
    active = tape.operation(gate.count, gate.width, (gate,), (gate,))
    product = layer.multiply(active, up)
    tape.drop(gate, active, up)
    outputs = grouped(layer, product, shape.expert_width, shape.hidden)
    tape.drop(product)
    weighted = layer.multiply(outputs, sorted_shares, outputs.count)
    tape.drop(outputs, sorted_shares, shares)
    back = tape.operation(weighted.count, weighted.width, (weighted,), (places,), temporary=weighted.nbytes)
    tape.drop(weighted)
    total = tape.operation(tokens * shape.hidden, back.width, (back,), gradients={id(back): back.nbytes})
    tape.drop(back, places)
    return layer.narrowed(total, h.width)


def _router(layer: Layer, h: Tensor) -> Tensor:
    """The shares of each token's experts, from a softmax in float32 over all."""
    shape, tape = layer.shape, layer.tape
    logits = layer.product(h, shape.hidden, shape.experts, layer.trains)
    every = tape.operation(logits.count, 4, (logits,), (OUT,))
    tape.drop(logits)
    top = layer.run.tokens * shape.top_experts
    indices = tape.leaf(top, INDEX)
    best = tape.operation(top, 4, (every,), (indices,), gradients={id(every): every.nbytes})
    tape.drop(every, indices)
    shares = tape.operation(top, 4, (best,), (best,))
    tape.drop(best)
    return shares


def grouped(layer: Layer, x: Tensor, inputs: int, outputs: int) -> Tensor:
    """One product for all experts, each on its own tokens."""
    shape, tape, run = layer.shape, layer.tape, layer.run
    weight = tape.weight(shape.experts * inputs * outputs, run.param, layer.trains)
    cast = tape.cast(x, run.param)
    saves = [weight] if cast.needs_grad else []
    if layer.trains:
        saves.append(cast)
    y = tape.operation(x.count // inputs * outputs, run.param, (cast, weight), saves, gradients={id(weight): weight.nbytes, id(cast): cast.nbytes})
    if cast is not x:
        tape.drop(cast)
    return y
