"""Matrix products on a tape, with what autocast, tensor parallel, PEFT (0.21's lora/layer.py) and bitsandbytes put around them."""

from __future__ import annotations

from collections.abc import Callable

from lmforge.model.families import Split
from lmforge.predict.tensors.run import LowRank, Run
from lmforge.predict.tensors.storage import Tensor
from lmforge.predict.tensors.tape import Tape


class Products:
    """Products of one layer under a run."""

    def __init__(self, tape: Tape, run: Run) -> None:
        self.tape, self.run, self.trains = tape, run, not run.frozen

    def linear(self, x: Tensor, inputs: int, outputs: int, name: str, bias: bool = False) -> Tensor:
        """y = x W^T (+ b); a matrix of a layer, which may be split, or an adapter sit on."""
        style = self.run.style(name)
        if style is None:
            return self.local(x, inputs, outputs, name, bias)
        return self.spread(x, inputs, outputs, style, lambda here, i, o: self.local(here, i, o, name, bias))

    def spread(self, x: Tensor, inputs: int, outputs: int, style: Split, product: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """A matrix that tensor parallel splits, as engine/tensor.py has it by DTensor: sums and gathers over ranks make tensors of their own."""
        tape, ranks = self.tape, self.run.tp
        if ranks == 1:
            return product(x, inputs, outputs)
        if style in ("column", "column_gathered"):
            whole = Tensor(x.storage, x.count, x.width, x.needs_grad)
            tape.joined(whole, x)  # its gradient is summed over ranks into a tensor of its own
            y = product(whole, inputs, -(-outputs // ranks))
            return y if style == "column" else self._gathered(y, x.count // inputs * outputs)
        part = self._own_part(x, -(-inputs // ranks) * (x.count // inputs)) if style == "row_from_whole" else x
        y = product(part, -(-inputs // ranks), outputs)
        if part is not x:
            tape.drop(part)
        summed = tape.passed(y)
        tape.drop(y)
        return summed

    def _gathered(self, y: Tensor, count: int) -> Tensor:
        """All ranks' outputs, gathered one after the other and then put side by side."""
        self.tape.temporary(count * y.width)
        whole = self.tape.operation(count, y.width, (y,), gradients={id(y): y.nbytes})
        self.tape.drop(y)
        return whole

    def _own_part(self, x: Tensor, count: int) -> Tensor:
        return self.tape.operation(count, x.width, (x,), temporary=x.nbytes, gradients={id(x): x.nbytes})

    def local(self, x: Tensor, inputs: int, outputs: int, name: str, bias: bool) -> Tensor:
        """A matrix, or a rank's part of one, with the adapter that sits on it."""
        tape, adapter = self.tape, self.run.adapter
        adapted = adapter is not None and name in adapter.targets
        if adapter is not None and adapter.four_bit:
            y = self.quantized(x, inputs, outputs)
            if adapted:  # PEFT clones it first
                copy = tape.operation(y.count, y.width, (y,))
                tape.drop(y)
                y = copy
        else:
            y = self.product(x, inputs, outputs, self.trains, bias)
        return self.low_rank(x, y, inputs, outputs, adapter) if adapter is not None and adapted else y

    def product(self, x: Tensor, inputs: int, outputs: int, trained: bool, bias: bool = False) -> Tensor:
        """A dense product. Autocast casts x anew for each, and keeps its copy of a trained weight until it is left; x's gradient saves a frozen one's."""
        tape, run = self.tape, self.run
        weight = tape.weight(inputs * outputs, run.param, trained)
        count = x.count // inputs * outputs
        if run.autocast and run.recasts:
            both = (weight.count + x.count * (x.width != run.compute)) * run.compute
            tape.temporary(both + count * run.compute)
            return tape.operation(count, run.compute, (x, weight), (x, weight), temporary=both, product=True)
        cast, copy = x, weight
        if run.autocast:
            cast = x if x.width == run.compute else tape.operation(x.count, run.compute, (x,), gradients={id(x): x.nbytes})
            copy = tape.operation(weight.count, run.compute, (weight,), gradients={id(weight): weight.nbytes})
        saves = [copy] if cast.needs_grad else []
        if trained:
            saves.append(cast)
        terms = [cast, copy, *([tape.weight(outputs, run.param, trained)] if bias else [])]
        y = tape.operation(count, run.compute, terms, saves, product=True)
        if cast is not x:
            tape.drop(cast)
        if copy is not weight and copy.storage is not None:
            if trained:
                tape.casts.append(copy.storage)
            else:
                tape.drop(copy)
        return y

    def quantized(self, x: Tensor, inputs: int, outputs: int) -> Tensor:
        """bitsandbytes' 4-bit product saves nothing of x, and its backward dequantizes the weight. Autocast does not know it: it computes in x's dtype."""
        return self.tape.operation(x.count // inputs * outputs, x.width, (x,), temporary=inputs * outputs * x.width)

    def low_rank(self, x: Tensor, y: Tensor, inputs: int, outputs: int, adapter: LowRank) -> Tensor:
        """y + scaling B(A(dropout(x))).

        PEFT casts the input to the adapter's dtype and autocast casts it back; its 4-bit layers leave that to autocast, but ask CUDA's, so that on a CPU
        they cast as well.
        """
        tape, run = self.tape, self.run
        left = adapter.four_bit and run.autocast and run.kernel != "cpu"
        cast = x if x.width == run.param or left else tape.operation(x.count, run.param, (x,), gradients={id(x): x.nbytes})
        dropped = cast
        if adapter.dropout:
            mask = tape.leaf(x.count, cast.width if run.kernel == "cpu" else 1)
            dropped = tape.operation(x.count, cast.width, (cast,), (mask,))
            tape.drop(mask)
        a = self.product(dropped, inputs, adapter.rank, True)
        if dropped is not cast:
            tape.drop(dropped)
        b = self.product(a, adapter.rank, outputs, True)
        tape.drop(a)
        if adapter.magnitude:
            scaled = self.directed(y, b, inputs, outputs)
        else:
            scaled = tape.operation(b.count, b.width, (b,))
            tape.drop(b)
        if adapter.four_bit and not left and scaled.width != y.width:
            back = tape.cast(scaled, y.width)
            tape.drop(scaled)
            scaled = back
        out = tape.add(y, scaled)
        tape.drop(y, scaled)
        if cast is not x:
            tape.drop(cast)
        return out

    def directed(self, y: Tensor, b: Tensor, inputs: int, outputs: int) -> Tensor:
        """(m - 1) y + m scaling b, m = magnitude / norm of each output (Liu et al. 2024); the norm needs whole weights for a moment."""
        tape, run = self.tape, self.run
        tape.temporary((inputs * inputs + 3 * inputs * outputs) * run.param)
        m = Tensor(tape.allocate(outputs * run.param), outputs, run.param, True)
        kept, turned = self.multiply(m, y, y.count), self.multiply(m, b, b.count)
        tape.drop(b)
        scaled = tape.operation(turned.count, turned.width, (turned,))
        tape.drop(turned)
        out = tape.add(kept, scaled)
        tape.drop(kept, scaled, m)
        return out

    def multiply(self, one: Tensor, other: Tensor, count: int = 0) -> Tensor:
        """one * other, each saved for the other's gradient."""
        count, width = count or max(one.count, other.count), max(one.width, other.width)
        saves = [factor for term, factor in ((one, other), (other, one)) if term.needs_grad]
        return self.tape.operation(count, width, (one, other), saves, gradients={id(one): count * width, id(other): count * width})
