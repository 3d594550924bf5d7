"""The order of a decoder layer's operations, family by family; `through` runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lmforge.predict.job import Kind
from lmforge.predict.tensors.decoder import Layer
from lmforge.predict.tensors.experts import mixture
from lmforge.predict.tensors.storage import OUT, Tensor


def through(layer: Layer, x: Tensor) -> Tensor:
    """The layer's output; the caller keeps its hold of x."""
    return ORDER[layer.shape.kind](layer, x)


def llama(layer: Layer, x: Tensor) -> Tensor:
    """A norm before attention and before the feed-forward, or the experts in its place (modeling_llama.py, modeling_mixtral.py)."""
    tape = layer.tape
    h = layer.norm(x)
    a = layer.attention(h)
    tape.drop(h)
    middle = tape.add(x, a)
    tape.drop(a)
    h = layer.norm(middle)
    m = mixture(layer, h) if layer.shape.experts else layer.gated(h)
    tape.drop(h)
    out = tape.add(middle, m)
    tape.drop(middle, m)
    return out


def olmo2(layer: Layer, x: Tensor) -> Tensor:
    """A norm after each (modeling_olmo2.py)."""
    tape = layer.tape
    a = layer.attention(x)
    h = layer.norm(a)
    tape.drop(a)
    middle = tape.add(x, h)
    tape.drop(h)
    m = layer.gated(middle)
    h = layer.norm(m)
    tape.drop(m)
    out = tape.add(middle, h)
    tape.drop(middle, h)
    return out


def gpt2(layer: Layer, x: Tensor) -> Tensor:
    """LayerNorm before each block, queries, keys and values from one product (modeling_gpt2.py)."""
    shape, tape = layer.shape, layer.tape
    h = layer.norm(x)
    joint = layer.linear(h, shape.hidden, 3 * shape.hidden, "attn.c_attn", bias=True)
    tape.drop(h)
    q, k, v = (tape.share(joint, joint.count // 3) for _ in range(3))
    tape.split(joint, (q, k, v))
    tape.drop(joint)
    mixed = layer.attend(q, k, v)
    y = layer.linear(mixed, shape.hidden, shape.hidden, "attn.c_proj", bias=True)
    tape.drop(mixed)
    middle = tape.add(y, x)
    tape.drop(y)
    h = layer.norm(middle)
    wide = layer.linear(h, shape.hidden, shape.intermediate, "mlp.c_fc", bias=True)
    tape.drop(h)
    active = gelu_new(layer, wide)
    tape.drop(wide)
    y = layer.linear(active, shape.intermediate, shape.hidden, "mlp.c_proj", bias=True)
    tape.drop(active)
    out = tape.add(middle, y)
    tape.drop(middle, y)
    return out


def gelu_new(layer: Layer, x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(c (x + 0.044715 x^3))) in single operations, as transformers writes it."""
    tape, count, width = layer.tape, x.count, x.width
    half = tape.operation(count, width, (x,))
    cube = tape.operation(count, width, (x,), (x,), temporary=2 * x.nbytes)
    scaled = tape.operation(count, width, (cube,))
    tape.drop(cube)
    total = tape.add(x, scaled)
    tape.drop(scaled)
    inner = tape.operation(count, width, (total,))
    tape.drop(total)
    bent = tape.operation(count, width, (inner,), (OUT,))
    tape.drop(inner)
    shifted = tape.operation(count, width, (bent,))
    tape.drop(bent)
    y = layer.multiply(half, shifted)
    tape.drop(half, shifted)
    return y


def gpt_neox(layer: Layer, x: Tensor) -> Tensor:
    """Attention and feed-forward side by side on the same input, or one after the other (modeling_gpt_neox.py)."""
    shape, tape = layer.shape, layer.tape
    h = layer.norm(x)
    joint = layer.linear(h, shape.hidden, 3 * shape.hidden, "attention.query_key_value", shape.qkv_bias)
    tape.drop(h)
    q, k, v = (tape.share(joint, joint.count // 3) for _ in range(3))
    tape.split(joint, (q, k, v))
    tape.drop(joint)
    turned_q, turned_k = partly_turned(layer, q), partly_turned(layer, k)
    tape.drop(q, k)
    mixed = layer.copied(layer.attend(turned_q, turned_k, v))  # the kernel's output lies as the queries do, which joining them laid out anew
    a = layer.linear(mixed, shape.hidden, shape.hidden, "attention.dense", shape.out_bias)
    tape.drop(mixed)
    if not shape.parallel:
        middle = tape.add(a, x)
        tape.drop(a)
        m = _plain_mlp(layer, middle)
        out = tape.add(m, middle)
        tape.drop(m, middle)
        return out
    m = _plain_mlp(layer, x)
    both = tape.add(m, a)
    out = tape.add(both, x)
    tape.drop(m, a, both)
    return out


def _plain_mlp(layer: Layer, x: Tensor) -> Tensor:
    """LayerNorm and two products with a GELU between."""
    shape, tape = layer.shape, layer.tape
    h = layer.norm(x)
    wide = layer.linear(h, shape.hidden, shape.intermediate, "mlp.dense_h_to_4h", bias=True)
    tape.drop(h)
    active = tape.operation(wide.count, wide.width, (wide,), (wide,))
    tape.drop(wide)
    y = layer.linear(active, shape.intermediate, shape.hidden, "mlp.dense_4h_to_h", bias=True)
    tape.drop(active)
    return y


def partly_turned(layer: Layer, one: Tensor) -> Tensor:
    """Rotary positions on a part of each head, the rest put beside it again."""
    tape, share = layer.tape, layer.shape.rotary_dim / layer.shape.head_dim
    part = Tensor(one.storage, int(one.count * share), one.width, one.needs_grad)
    tape.joined(part, one)
    turned = layer.rotary(part)
    rest = Tensor(one.storage, one.count - part.count, one.width, one.needs_grad)
    tape.joined(rest, one)
    out = tape.operation(one.count, turned.width, (turned, rest), gradients={id(turned): 0, id(rest): 0})
    tape.drop(turned)
    return out


def gemma2(layer: Layer, x: Tensor) -> Tensor:
    """A norm before and after each block (modeling_gemma2.py)."""
    middle = _between_norms(layer, x, layer.attention)
    out = _between_norms(layer, middle, layer.gated)
    layer.tape.drop(middle)
    return out


def _between_norms(layer: Layer, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
    tape = layer.tape
    h = layer.norm(x)
    y = block(h)
    tape.drop(h)
    h = layer.norm(y)
    tape.drop(y)
    out = tape.add(x, h)
    tape.drop(h)
    return out


ORDER: Mapping[Kind, Callable[[Layer, Tensor], Tensor]] = {"llama": llama, "olmo2": olmo2, "gemma2": gemma2, "gpt2": gpt2, "gpt_neox": gpt_neox}
