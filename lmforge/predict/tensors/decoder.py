"""Decoder layers as the operations that transformers 5.23's modeling files run, on a tape: what is saved and what is alive follows from sizes."""

from __future__ import annotations

from lmforge.predict.job import Shape
from lmforge.predict.tensors.attention import Attention
from lmforge.predict.tensors.norms import Norms
from lmforge.predict.tensors.run import Run
from lmforge.predict.tensors.storage import Tensor
from lmforge.predict.tensors.tape import Tape


class Layer(Norms, Attention):
    """What a layer of a shape is made of, under a run; `families` puts it in order. `trig` is a rotary table, whose bytes are counted elsewhere."""

    def __init__(self, tape: Tape, shape: Shape, run: Run) -> None:
        ranks = run.tp if run.by_heads else 1
        super().__init__(tape, run, shape.heads // ranks, shape.kv_heads // ranks, capped=shape.kind == "gemma2")
        self.shape, self.trig = shape, Tensor(None, 0, run.param, False)

    def norm(self, x: Tensor) -> Tensor:
        """The family's norm over the hidden size."""
        kind, width = self.shape.kind, self.shape.hidden
        return self.layer_norm(x, width) if kind in ("gpt2", "gpt_neox") else self.rms_norm(x, width, late=kind in ("olmo2", "gemma2"))

    def output(self, h: Tensor) -> Tensor:
        """The output product, whose logits tensor parallel gathers on every rank."""
        shape = self.shape
        return self.spread(h, shape.hidden, shape.vocab, "column_gathered", lambda x, i, o: self.product(x, i, o, self.trains))

    # Attention and feed-forward of Llama's kind

    def attention(self, h: Tensor) -> Tensor:
        """Projections, norms of queries and keys, rotary positions, the kernel, and the output's projection."""
        shape, tape = self.shape, self.tape
        q = self.normed(self.linear(h, shape.hidden, shape.queries, "self_attn.q_proj", shape.qkv_bias), shape.queries)
        k = self.normed(self.linear(h, shape.hidden, shape.keys, "self_attn.k_proj", shape.qkv_bias), shape.keys)
        v = self.linear(h, shape.hidden, shape.keys, "self_attn.v_proj", shape.qkv_bias)
        turned_q, turned_k = self.rotary(q), self.rotary(k)
        tape.drop(q, k)
        out = self.attend(turned_q, turned_k, v)
        y = self.linear(out, shape.queries, shape.hidden, "self_attn.o_proj", shape.out_bias)
        tape.drop(out)
        return y

    def normed(self, one: Tensor, width: int) -> Tensor:
        """Queries or keys after their norm, where the family has one."""
        if self.shape.head_norm == "none":
            return one
        every = self.shape.head_norm == "all"
        y = self.rms_norm(one, width if every else self.shape.head_dim, late=every)
        self.tape.drop(one)
        return y

    def rotary(self, one: Tensor) -> Tensor:
        """x * cos + rotate_half(x) * sin."""
        tape, count, width = self.tape, one.count, max(one.width, self.trig.width)
        straight = tape.operation(count, width, (one,), (self.trig,))
        half = tape.operation(count // 2, one.width, (one,), gradients={id(one): one.nbytes})
        rest = Tensor(one.storage, count // 2, one.width, one.needs_grad)
        tape.joined(rest, one)
        turned = tape.operation(count, one.width, (half, rest), gradients={id(half): 0, id(rest): 0})
        tape.drop(half)
        crossed = tape.operation(count, width, (turned,), (self.trig,))
        tape.drop(turned)
        out = tape.add(straight, crossed)
        tape.drop(straight, crossed)
        return out

    def gated(self, h: Tensor) -> Tensor:
        """SwiGLU (Shazeer 2020)."""
        shape, tape = self.shape, self.tape
        gate = self.linear(h, shape.hidden, shape.intermediate, "mlp.gate_proj", shape.mlp_bias)
        active = tape.operation(gate.count, gate.width, (gate,), (gate,))
        tape.drop(gate)
        up = self.linear(h, shape.hidden, shape.intermediate, "mlp.up_proj", shape.mlp_bias)
        product = self.multiply(active, up)
        tape.drop(active, up)
        y = self.linear(product, shape.intermediate, shape.hidden, "mlp.down_proj", shape.mlp_bias)
        tape.drop(product)
        return y
