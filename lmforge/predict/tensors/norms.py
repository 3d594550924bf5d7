"""Norms on a tape, operation by operation as transformers writes them."""

from __future__ import annotations

from lmforge.predict.tensors.products import Products
from lmforge.predict.tensors.storage import OUT, Tensor


class Norms(Products):
    """RMSNorm and LayerNorm over the last `width` elements."""

    def rms_norm(self, x: Tensor, width: int, *, late: bool = False) -> Tensor:
        """w * (x in float32 * rsqrt(mean x^2)), cast back before w or, in OLMo 2, after it (`late`)."""
        tape, count = self.tape, x.count
        wide = x if x.width == 4 else tape.operation(count, 4, (x,), gradients={id(x): x.nbytes})
        squares = tape.operation(count, 4, (wide,), (wide,), temporary=8 * count)
        mean = tape.operation(count // width, 4, (squares,), gradients={id(squares): 4 * count})
        tape.drop(squares)
        scale = tape.operation(count // width, 4, (mean,), (OUT,))
        tape.drop(mean)
        normed = self.multiply(wide, scale, count)
        tape.drop(scale)
        if wide is not x:
            tape.drop(wide)
        if not late:
            normed = self.narrowed(normed, x.width)
        y = self.multiply(tape.weight(width, self.run.param, self.trains), normed, count)
        tape.drop(normed)
        return self.narrowed(y, x.width) if late else y

    def narrowed(self, one: Tensor, width: int) -> Tensor:
        """Cast, and let go of what was cast."""
        if one.width == width:
            return one
        low = self.tape.operation(one.count, width, (one,), gradients={id(one): one.nbytes})
        self.tape.drop(one)
        return low

    def layer_norm(self, x: Tensor, width: int) -> Tensor:
        """torch's saves its input, mean and deviation. Autocast runs it in float32."""
        tape = self.tape
        weight, bias = (tape.weight(width, self.run.param, self.trains) for _ in range(2))
        wide = x if not self.run.autocast or x.width == 4 else tape.operation(x.count, 4, (x,), gradients={id(x): x.nbytes})
        figures = tape.leaf(2 * (x.count // width), 4)
        y = tape.operation(x.count, wide.width, (wide, weight, bias), (wide, figures), gradients={id(weight): width * 4, id(bias): width * 4})
        tape.drop(figures)
        if wide is not x:
            tape.drop(wide)
        return y
