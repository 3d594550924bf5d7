"""Storages, tensors and the nodes of a graph, as a tape counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Held(NamedTuple):
    """Bytes at one moment, by what they are."""

    total: int
    logits: int = 0
    grads: int = 0  # of parameters, left by backward


class Storage:
    """Bytes, and how many hold them."""

    __slots__ = ("holders", "logits", "nbytes")

    def __init__(self, nbytes: int, logits: bool = False) -> None:
        self.nbytes, self.holders, self.logits = nbytes, 1, logits


class Tensor:
    """A storage and a place in the graph; a view is the same tensor. The gradient of a parameter stays after backward."""

    __slots__ = ("count", "gradient", "logits", "needs_grad", "parameter", "storage", "width")

    def __init__(self, storage: Storage | None, count: int, width: int, needs_grad: bool, parameter: bool = False) -> None:
        self.storage, self.count, self.width, self.needs_grad, self.parameter = storage, count, width, needs_grad, parameter
        self.gradient: Storage | None = None
        self.logits = False

    @property
    def nbytes(self) -> int:
        return self.count * self.width


class Node:
    """An operation's place in backward. `inputs` come with the bytes of the gradient as it is made; None: as many as the output's width gives."""

    __slots__ = ("call", "held", "inputs", "output", "passes", "saves", "temporary")

    def __init__(self, output: Tensor, held: list[Storage], inputs: list[tuple[Tensor, int | None]], temporary: int, saves: int) -> None:
        self.output, self.held, self.inputs, self.temporary, self.saves = output, held, inputs, temporary, saves
        self.passes = False  # hands its gradient on as it is
        self.call: Callable[[Storage], None] | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Its output, and its inputs."""
        yield self.output
        for one, _ in self.inputs:
            yield one


OUT = Tensor(None, 0, 0, False)  # among what an operation saves: its own output
