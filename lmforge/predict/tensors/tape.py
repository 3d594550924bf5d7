"""A tape of tensors without torch: which bytes an eager autograd step holds at once, operation by operation.

The rules are torch's own (its note "Autograd mechanics"; torch/csrc/autograd/engine.cpp and input_buffer.cpp; tools/autograd/derivatives.yaml). An
operation saves what its backward formula names. A saved tensor lives until its node has run. A node's incoming gradient, what it saved and what it makes
live together. A second gradient of one tensor is added in place where nobody else holds the first. Views share their base's storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lmforge.predict.tensors.storage import OUT, Held, Node, Storage, Tensor


class Tape:
    """Forward operations append nodes; `backward` runs them, the latest first, as the engine orders them."""

    def __init__(self, *, accumulated: bool = False) -> None:
        self.now = self.logits = self.grads = 0
        self.peak = Held(0)
        self.nodes: list[Node] = []
        self.recording = True
        self.accumulated = accumulated  # gradients of an earlier micro-batch are there to be added to
        self.casts: list[Storage] = []  # autocast's copies of weights, alive until autocast is left
        self.keep: list[Storage] | None = None  # under selective checkpointing: where kept outputs go
        self.given: list[Storage] = []  # kept outputs that a recomputation finds
        self.saves = 0  # saved tensors so far
        self.stop_at: int | None = None  # a recomputation ends at the last tensor that is saved
        self.ghost = False  # operations that are not run, for their nodes alone

    # Storages

    def allocate(self, nbytes: int, logits: bool = False) -> Storage:
        if self.ghost:
            return Storage(0)
        self.now += nbytes
        if logits:
            self.logits += nbytes
        if self.now > self.peak.total:
            self.peak = Held(self.now, self.logits, self.grads)
        return Storage(nbytes, logits)

    def release(self, storage: Storage) -> None:
        storage.holders -= 1
        if not storage.holders:
            self.now -= storage.nbytes
            if storage.logits:
                self.logits -= storage.nbytes

    def drop(self, *tensors: Tensor) -> None:
        """Python lets go of these names."""
        for one in tensors:
            if one.storage is not None:
                self.release(one.storage)

    def temporary(self, nbytes: int, logits: bool = False) -> None:
        """Made and gone within one operation."""
        self.release(self.allocate(nbytes, logits))

    def marks_logits(self, one: Tensor) -> None:
        """From here on its bytes, and its gradient's, are logits."""
        assert one.storage is not None
        one.logits = one.storage.logits = True
        self.logits += one.storage.nbytes

    def grow(self, one: Tensor, nbytes: int) -> None:
        """More bytes that live as long as the tensor."""
        if one.storage is None or self.ghost:
            return
        one.storage.nbytes += nbytes
        self.now += nbytes
        if self.now > self.peak.total:
            self.peak = Held(self.now, self.logits, self.grads)

    def leaf(self, count: int, width: int, needs_grad: bool = False) -> Tensor:
        """A tensor that comes from elsewhere, held by a name."""
        return Tensor(self.allocate(count * width), count, width, needs_grad)

    @staticmethod
    def weight(count: int, width: int, trained: bool) -> Tensor:
        """A parameter, whose own bytes are counted elsewhere."""
        return Tensor(None, count, width, trained, parameter=True)

    def share(self, one: Tensor, count: int) -> Tensor:
        """A part of a tensor under a name of its own; `joined` tells backward."""
        assert one.storage is not None
        one.storage.holders += 1
        return Tensor(one.storage, count, one.width, one.needs_grad)

    # Operations

    def operation(
        self,
        count: int,
        width: int,
        inputs: Sequence[Tensor] = (),
        saves: Sequence[Tensor] = (),
        *,
        temporary: int = 0,
        gradients: Mapping[int, int] | None = None,
        product: bool = False,
    ) -> Tensor:
        """An output of `count` elements. `gradients`: bytes that backward makes for an input, by its id, before it is reduced and cast to the input's own.

        `temporary` bytes live in its backward only; `product`: selective checkpointing keeps the output.
        """
        needing = [one for one in inputs if one.needs_grad]
        held: list[Storage] = []
        if needing:
            real = [one for one in saves if one is not OUT]
            if self.recording:
                held = [self._hold(one.storage) for one in real if one.storage is not None]
            self._saved(len(real))
        storage = self.given.pop(0) if product and self.given and not self.ghost else self.allocate(count * width)
        if product and self.keep is not None:
            self.keep.append(self._hold(storage))
        output = Tensor(storage, count, width, bool(needing))
        if needing and len(saves) and any(one is OUT for one in saves):
            if self.recording:
                held.append(self._hold(storage))
            self._saved(1)
        if needing and self.recording:
            made = gradients or {}
            self.nodes.append(Node(output, held, [(one, made.get(id(one))) for one in needing], temporary, len(saves)))
        return output

    @staticmethod
    def _hold(storage: Storage) -> Storage:
        storage.holders += 1
        return storage

    def _saved(self, tensors: int) -> None:
        """Recomputing goes no further than the last saved tensor (torch.utils.checkpoint's early stop)."""
        self.saves += tensors
        if tensors and self.stop_at is not None and self.saves >= self.stop_at:
            self.ghost = True

    def add(self, one: Tensor, other: Tensor) -> Tensor:
        """one + other: saves nothing, and hands its gradient to both as it is."""
        width = max(one.width, other.width)
        output = Tensor(self.allocate(one.count * width), one.count, width, one.needs_grad or other.needs_grad)
        self._passes(output, one, other)
        return output

    def passed(self, one: Tensor) -> Tensor:
        """A copy whose gradient is its input's: a sum over ranks."""
        output = Tensor(self.allocate(one.nbytes), one.count, one.width, one.needs_grad)
        self._passes(output, one)
        return output

    def _passes(self, output: Tensor, *inputs: Tensor) -> None:
        if output.needs_grad and self.recording:
            node = Node(output, [], [(one, None) for one in inputs if one.needs_grad], 0, 0)
            node.passes = True
            self.nodes.append(node)

    def joined(self, part: Tensor, whole: Tensor) -> None:
        """A view's gradient becomes one of the whole tensor."""
        if whole.needs_grad and self.recording:
            self.nodes.append(Node(part, [], [(whole, whole.nbytes)], 0, 0))

    def split(self, whole: Tensor, parts: Sequence[Tensor]) -> None:
        """All of a tensor's parts in one view operation, whose backward joins them."""
        if whole.needs_grad and self.recording:
            self.joined(parts[0], whole)
            for part in parts[1:]:
                self.nodes.append(Node(part, [], [(parts[0], None)], 0, 0))

    def calls(self, output: Tensor, call: Callable[[Storage], None]) -> None:
        """Backward of `output` is `call` with its gradient."""
        node = Node(output, [], [], 0, 0)
        node.call = call
        self.nodes.append(node)

    def cast(self, one: Tensor, width: int) -> Tensor:
        """The tensor in `width` bytes an element: itself where it has them."""
        return one if one.width == width else self.operation(one.count, width, (one,), gradients={id(one): one.nbytes})

    # Backward

    def backward(self, down_to: int = 0) -> None:
        """Run all nodes, or those after the first `down_to`."""
        while len(self.nodes) > down_to:
            node = self.nodes.pop()
            gradient, node.output.gradient = node.output.gradient, None
            if node.call is not None:
                assert gradient is not None
                node.call(gradient)
            elif gradient is None:
                for storage in node.held:
                    self.release(storage)
            elif node.passes:
                self._pass_on(node, gradient)
            else:
                self._differentiate(node, gradient)

    def _pass_on(self, node: Node, gradient: Storage) -> None:
        for one, _ in node.inputs:
            self._give(one, self._hold(gradient) if one.nbytes == gradient.nbytes else self.allocate(one.nbytes))
        self.release(gradient)

    def _differentiate(self, node: Node, gradient: Storage) -> None:
        width, temporary = node.output.width, None
        if node.temporary:
            temporary = self.allocate(node.temporary, any(one.logits for one, _ in node.inputs))
        made = [(one, self.allocate(one.count * width if size is None else size, one.logits)) for one, size in node.inputs]
        if temporary is not None:
            self.release(temporary)
        for storage in node.held:
            self.release(storage)
        self.release(gradient)
        for one, storage in made:
            if storage.nbytes != one.nbytes:  # the engine reduces and casts to the input's shape and dtype
                fitting = self.allocate(one.nbytes, one.logits)
                self.release(storage)
                storage = fitting
            self._give(one, storage)

    def _give(self, one: Tensor, storage: Storage) -> None:
        if one.gradient is None:
            one.gradient = storage
        elif one.gradient.holders == 1:
            self.release(storage)
        else:
            total = self.allocate(storage.nbytes)
            self.release(one.gradient)
            self.release(storage)
            one.gradient = total
        if one.parameter:
            self._keep(one)

    def _keep(self, one: Tensor) -> None:
        """A parameter's gradient stays, or is added to the one that is there."""
        assert one.gradient is not None
        if self.accumulated:
            self.release(one.gradient)
        else:
            self.grads += one.gradient.nbytes
        one.gradient = None
