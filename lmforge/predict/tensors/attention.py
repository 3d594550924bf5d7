"""Attention on a tape, as transformers 5.23 (integrations/sdpa_attention.py) and lmforge.training.shared_prompt call torch's kernels."""

from __future__ import annotations

from lmforge.predict.tensors.products import Products
from lmforge.predict.tensors.run import Attended, Run
from lmforge.predict.tensors.storage import OUT, Tensor
from lmforge.predict.tensors.tape import Tape


class Attention(Products):
    """Queries [rows, heads, length, head_dim], keys and values of `kv_heads`, to their product; all three are let go of."""

    def __init__(self, tape: Tape, run: Run, heads: int, kv_heads: int, capped: bool = False) -> None:
        super().__init__(tape, run)
        self.heads, self.kv_heads, self.capped = heads, kv_heads, capped

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run, tape = self.run, self.tape
        if run.kernel == "eager":
            return self.eager(q, k, v)
        if run.autocast:
            q, k, v = (self.lowered(one) for one in (q, k, v))
        if run.attended:
            return self.by_parts(q, k, v)
        mask = None
        if run.masked:
            k, v = self.repeated(k), self.repeated(v)
            mask = tape.leaf(run.rows * run.length * run.length, run.compute)
        elif run.kernel == "efficient":
            k, v = self.repeated(k), self.repeated(v)  # it takes as many keys as queries
        return self.fused((q, k, v), run.rows * run.length, mask)

    def by_parts(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A shared prompt: the prompt's queries by themselves, then each answer's, before prompt and answer put together and a mask."""
        tape = self.tape
        outs = [self._part(q, k, v, part) for part in self.run.attended]
        tape.drop(q, k, v)
        joined = tape.operation(sum(one.count for one in outs), outs[0].width, outs, gradients={id(one): 0 for one in outs})
        tape.drop(*outs)
        return joined

    def _part(self, q: Tensor, k: Tensor, v: Tensor, part: Attended) -> Tensor:
        tape, run = self.tape, self.run
        here = [tape.share(one, run.rows * part.queries * (one.count // run.tokens)) for one in (q, k, v)]
        mask = None
        for small, whole in list(zip(here, (q, k, v), strict=True))[: 1 if part.masked else 3]:
            tape.joined(small, whole)
        if part.masked:
            keys = []
            for whole in (k, v):
                count = run.rows * part.keys * (whole.count // run.tokens)
                keys.append(self.repeated(tape.operation(count, whole.width, (whole,), temporary=whole.nbytes)))
            tape.drop(*here[1:])
            here[1:] = keys
            mask = tape.leaf(run.rows * part.masked, run.compute)
        return self.fused((here[0], here[1], here[2]), run.rows * part.queries, mask)

    def lowered(self, one: Tensor) -> Tensor:
        """In the dtype of products."""
        if one.width == self.run.compute:
            return one
        low = self.tape.operation(one.count, self.run.compute, (one,), gradients={id(one): one.nbytes})
        self.tape.drop(one)
        return low

    def repeated(self, one: Tensor) -> Tensor:
        """Keys or values for every query head, where a mask keeps the kernel from doing that itself."""
        if self.heads == self.kv_heads:
            return one
        many = self.tape.operation(one.count // self.kv_heads * self.heads, one.width, (one,), gradients={id(one): one.nbytes})
        self.tape.drop(one)
        return many

    def fused(self, qkv: tuple[Tensor, Tensor, Tensor], queries: int, mask: Tensor | None) -> Tensor:
        """A kernel without scores in memory: saves q, k, v, its output and a log-sum-exp a query and head (Dao et al. 2022, arXiv 2205.14135).

        Backward, from torch's source: flash has dq in float32, row sums, and dk and dv for every query head (flash_api.cpp).
        """
        tape, run, (q, k, v) = self.tape, self.run, qkv
        lse = queries * self.heads * 4
        behind = 0
        if run.kernel == "flash":
            behind = q.count * 4 + lse + (2 * q.nbytes if k.count != q.count else 0)
        elif run.kernel == "efficient":
            behind = lse
        saves = [q, k, v, OUT, *([mask] if mask is not None else [])]
        out = tape.operation(q.count, q.width, (q, k, v), saves, temporary=behind, product=True)
        tape.grow(out, lse)
        tape.drop(q, k, v)
        if mask is not None:
            tape.drop(mask)
        return out

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores kept in full: softmax in float32, and its copy for the product with the values."""
        tape, run = self.tape, self.run
        count = run.rows * self.heads * run.length**2
        several = run.rows > 1
        k, v = self.repeated(k), self.repeated(v)
        q, k = (self.copied(self.lowered(one)) if several else self.lowered(one) for one in (q, k))
        scores = tape.operation(count, run.compute, (q, k), (q, k))
        tape.drop(q, k)
        capped = ((), (), (OUT,), (), ()) if self.capped else ((), ())  # scaled; divided by the cap, bent, multiplied by it; masked
        for step, saves in enumerate(capped, 1):
            width = max(run.compute, run.param) if step == len(capped) else run.compute
            following = tape.operation(count, width, (scores,), saves)
            tape.drop(scores)
            scores = following
        shares = tape.operation(count, 4, (scores,), (OUT,))
        tape.drop(scores)
        shares, v = self.lowered(shares), self.lowered(v)
        v = self.copied(v) if several else v
        out = tape.operation(q.count, run.compute, (shares, v), (shares, v))
        tape.drop(shares, v)
        return self.copied(out)

    def copied(self, one: Tensor) -> Tensor:
        """Laid out anew."""
        copy = self.tape.operation(one.count, one.width, (one,))
        self.tape.drop(one)
        return copy
